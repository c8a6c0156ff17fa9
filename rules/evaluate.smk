# Evaluation of a checkpoint, with its adapter where there is one.
rule perplexity:
    input:
        inputs_of,
    output:
        "results/perplexity/{label}/{key}/provenance.json",
    log:
        "logs/perplexity/{label}/{key}.log",
    threads: threads_of
    params:
        request=request_of,
    shell:
        f"{RUN}/perplexity.py --request {{params.request:q}} > {{log}} 2>&1"


rule tasks:
    input:
        inputs_of,
    output:
        "results/tasks/{label}/{key}/provenance.json",
    log:
        "logs/tasks/{label}/{key}.log",
    threads: threads_of
    params:
        request=request_of,
    shell:
        f"{RUN}/tasks.py --request {{params.request:q}} > {{log}} 2>&1"


# Takes all cores, so that nothing else disturbs the clock.
rule efficiency:
    input:
        inputs_of,
    output:
        "results/efficiency/{label}/{key}/provenance.json",
    log:
        "logs/efficiency/{label}/{key}.log",
    threads: workflow.cores
    params:
        request=request_of,
    shell:
        f"{RUN}/efficiency.py --request {{params.request:q}} > {{log}} 2>&1"
