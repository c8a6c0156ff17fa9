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
    params:
        request=request_of,
    shell:
        f"{RUN}/fetch_model.py --request {{params.request:q}} > {{log}} 2>&1"


rule fetch_text:
    input:
        inputs_of,
    output:
        "results/fetch_text/{label}/{key}/provenance.json",
    log:
        "logs/fetch_text/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/fetch_text.py --request {{params.request:q}} > {{log}} 2>&1"


rule fetch_analogies:
    input:
        inputs_of,
    output:
        "results/fetch_analogies/{label}/{key}/provenance.json",
    log:
        "logs/fetch_analogies/{label}/{key}.log",
    params:
        request=request_of,
    shell:
        f"{RUN}/fetch_analogies.py --request {{params.request:q}} > {{log}} 2>&1"
