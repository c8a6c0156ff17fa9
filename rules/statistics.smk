# Statistic passes over a calibration set, shared by all criteria that read them.
rule statistics:
    input:
        inputs_of,
    output:
        "results/statistics/{label}/{key}/provenance.json",
    log:
        "logs/statistics/{label}/{key}.log",
    threads: threads_of
    params:
        request=request_of,
    shell:
        f"{RUN}/collect_statistics.py --request {{params.request:q}} > {{log}} 2>&1"
