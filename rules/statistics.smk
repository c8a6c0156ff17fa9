# Statistic passes over a calibration set, shared by all criteria that read them.
rule statistics:
    input:
        inputs_of,
    output:
        "results/statistics/{label}/{key}/provenance.json",
    log:
        "logs/statistics/{label}/{key}.log",
    threads: threads_of
    resources:
        **RESOURCES,
    params:
        request=request_of,
    shell:
        step_command("collect_statistics")
