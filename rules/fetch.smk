# Models and texts: the only steps that use a network. They run where the workflow was started.
localrules:
    fetch_model,
    fetch_text,
    fetch_analogies,


rule fetch_model:
    input:
        inputs_of,
    output:
        "results/fetch_model/{label}/{key}/provenance.json",
    log:
        "logs/fetch_model/{label}/{key}.log",
    resources:
        **of_step("fetch_model"),
    params:
        request=request_of,
    shell:
        step_command("fetch_model")


rule fetch_text:
    input:
        inputs_of,
    output:
        "results/fetch_text/{label}/{key}/provenance.json",
    log:
        "logs/fetch_text/{label}/{key}.log",
    resources:
        **of_step("fetch_text"),
    params:
        request=request_of,
    shell:
        step_command("fetch_text")


rule fetch_analogies:
    input:
        inputs_of,
    output:
        "results/fetch_analogies/{label}/{key}/provenance.json",
    log:
        "logs/fetch_analogies/{label}/{key}.log",
    resources:
        **of_step("fetch_analogies"),
    params:
        request=request_of,
    shell:
        step_command("fetch_analogies")
