# Calibration sets, and the items of the local tasks.
rule calibration:
    input:
        inputs_of,
    output:
        "results/calibration/{label}/{key}/provenance.json",
    log:
        "logs/calibration/{label}/{key}.log",
    localrule: runs_here("calibration")
    resources:
        **of_step("calibration"),
    params:
        request=request_of,
    shell:
        step_command("calibration")


rule tasks_data:
    input:
        inputs_of,
    output:
        "results/tasks_data/{label}/{key}/provenance.json",
    log:
        "logs/tasks_data/{label}/{key}.log",
    localrule: runs_here("tasks_data")
    resources:
        **of_step("tasks_data"),
    params:
        request=request_of,
    shell:
        step_command("tasks_data")
