"""Commands `plan show` and `plan check`: inspect a plan before running it."""

from __future__ import annotations

import typer

from crosscal.cli.options import HOME, Domain, Home, Json, PlanFile, Set
from crosscal.cli.printing import print_value

app = typer.Typer(help="Read a plan before running it.", no_args_is_help=True)


@app.command("show")
def show(plan: PlanFile, overrides: Set = None, domain: Domain = None) -> None:
    """Print the plan with every default written out."""
    from crosscal.plan import dump_plan, load_plan

    print(dump_plan(load_plan(plan, tuple(overrides or ()), domain)), end="")


@app.command("check")
def check(
    plan: PlanFile, overrides: Set = None, domain: Domain = None, home: Home = HOME, as_json: Json = False
) -> None:
    """Report what a run would compute, what is cached, what it needs and whether that is available."""
    from crosscal.flows.preflight import check_plan
    from crosscal.plan import load_plan

    findings = check_plan(load_plan(plan, tuple(overrides or ()), domain), home)
    print_value(findings, as_json)
    if findings["problems"]:
        raise typer.Exit(1)
