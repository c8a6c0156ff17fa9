# Evaluation of a checkpoint, with its adapter where there is one.
rule perplexity:
    input:
        inputs_of,
    output:
        "results/perplexity/{label}/{key}/provenance.json",
    log:
        "logs/perplexity/{label}/{key}.log",
    threads: THREADS
    resources:
        **of_step("perplexity"),
    params:
        request=request_of,
    shell:
        step_command("perplexity")


rule tasks:
    input:
        inputs_of,
    output:
        "results/tasks/{label}/{key}/provenance.json",
    log:
        "logs/tasks/{label}/{key}.log",
    threads: THREADS
    resources:
        **of_step("tasks"),
    params:
        request=request_of,
    shell:
        step_command("tasks")


# Takes all cores (on a cluster a whole node), so that nothing else disturbs the clock.
rule efficiency:
    input:
        inputs_of,
    output:
        "results/efficiency/{label}/{key}/provenance.json",
    log:
        "logs/efficiency/{label}/{key}.log",
    threads: workflow.resource_settings.cores or 1
    resources:
        **of_step("efficiency"),
    params:
        request=request_of,
    shell:
        step_command("efficiency")
