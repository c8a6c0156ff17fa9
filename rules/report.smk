# Table, plots and page under stable names, made anew from the cells. The stamp names what they show.
from prunelib.sharing.repository import report_stamp


def report_command(*options):
    """The command that writes the report."""
    return " ".join(
        (
            f"{RUN}/report.py --experiment {shell_word(EXPERIMENT.path)}",
            f"--catalogue {shell_word(EXPERIMENT.config)} --out results",
            *options,
        )
    )


rule report:
    input:
        lambda wildcards: [ancient(node.target) for node in waits_for(TERMINAL, WANTED)],
    output:
        touch("results/.report-{key}"),
    log:
        "logs/report-{key}.log",
    shell:
        "rm -f results/.report-*; " + report_command("> {log} 2>&1")


onsuccess:
    if report_stamp(EXPERIMENT).exists():
        print(f"report: {Path('results/report.html').resolve()}")


onerror:
    from prunelib.cluster.progress import failures

    for line in failures(NODES, STARTED):
        say(line)
    # What has finished is worth a page; it names what is missing, and is no whole report.
    shell("rm -f results/.report-*; " + report_command("--partial || true"))
