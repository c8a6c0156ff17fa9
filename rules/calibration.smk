# Calibration sets, and the items of the local tasks.
rule calibration:
    input:
        inputs_of,
    output:
        "results/calibration/{label}/{key}/provenance.json",
    log:
        "logs/calibration/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/calibration.py --request {{params.request:q}} > {{log}} 2>&1"


rule tasks_data:
    input:
        inputs_of,
    output:
        "results/tasks_data/{label}/{key}/provenance.json",
    log:
        "logs/tasks_data/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/tasks_data.py --request {{params.request:q}} > {{log}} 2>&1"
