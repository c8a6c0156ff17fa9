# Statistic passes over a calibration set, shared by all criteria that read them.
rule statistics:
    input:
        inputs_of,
    output:
        "results/statistics/{label}/{key}/provenance.json",
    log:
        "logs/statistics/{label}/{key}.log",
    threads: THREADS
    resources:
        **of_step("statistics"),
    params:
        request=request_of,
    shell:
        step_command("collect_statistics")
