"""`nemoport repo`: the life of a repository's models, a short function a verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemoport.cli.options import PATH, json_option, keys_option, numbers, release_option
from nemoport.compatibility import Runtime

if TYPE_CHECKING:
    from nemoport.repository.change import Done
    from nemoport.repository.transfer import Sent

repository_argument = click.argument("repository", type=PATH)
force_option = click.option("--force", is_flag=True, help="In spite of a red verdict; recorded.")
names_option = click.option("--model", "names", multiple=True, metavar="NAME", help="Only this one; repeatable.")


@click.group()
def repo() -> None:
    """The versions of a repository's models."""


@repo.command("list")
@repository_argument
@json_option
def list_(repository: Path, as_json: bool) -> None:
    """Every version of every model: its state, its labels, its verdict."""
    from nemoport import show
    from nemoport.repository import compare
    from nemoport.repository.versions import models, state

    names = models(repository)
    if as_json:
        known = [(state(repository, name), compare.rows(repository, name)) for name in names]
        words = ("live", "staged", "unlisted", "labels")
        show.json(
            {
                "models": [
                    {"model": each.name, **{word: getattr(each, word) for word in words}, "versions": rows}
                    for each, rows in known
                ]
            }
        )
    else:
        show.table([row for name in names for row in compare.rows(repository, name)])


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("version", required=False)
@force_option
@json_option
def promote(repository: Path, name: str, version: str | None, force: bool, as_json: bool) -> None:
    """Make a staged version live, if its validation was green."""
    from nemoport.repository.promote import promote as run

    _say(run(repository, name, version, force=force), "promoted", as_json)


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("version", required=False)
@json_option
def rollback(repository: Path, name: str, version: str | None, as_json: bool) -> None:
    """Take back the newest promotion, or serve the VERSION before it that is named."""
    from nemoport.repository.retreat import rollback as run

    _say(run(repository, name, version), "rolled back to", as_json)


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("version")
@json_option
def retire(repository: Path, name: str, version: str, as_json: bool) -> None:
    """Serve a version no more; its files stay."""
    from nemoport.repository.retreat import retire as run

    _say(run(repository, name, version), "retired", as_json)


@repo.command()
@repository_argument
@click.argument("name", required=False)
@click.option("--keep", type=int, required=True, metavar="N", help="How many live versions stay.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
@json_option
def prune(repository: Path, name: str | None, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove the files of versions that nobody needs; labelled ones stay, and all evidence."""
    from nemoport import show
    from nemoport.repository import retreat
    from nemoport.repository.versions import models, state

    names = [name] if name else list(models(repository))
    found = {each: retreat.superfluous(state(repository, each), keep) for each in names}
    if not dry_run:
        for each in names:
            retreat.prune(repository, each, keep)
    rows = [{"model": each, "removed": versions} for each, versions in found.items()]
    show.json({"dry_run": dry_run, "models": rows}) if as_json else show.table(rows)


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("label")
@click.argument("version", required=False)
@click.option("--remove", is_flag=True, help="Take the label away.")
@force_option
@json_option
def label(
    repository: Path, name: str, label: str, version: str | None, remove: bool, force: bool, as_json: bool
) -> None:
    """Name a version: servers with --model-config-name LABEL serve it. `stable` is what all others serve."""
    from nemoport.repository import labels

    if remove == (version is not None):
        raise click.UsageError("give a VERSION, or --remove")
    if version is None:
        _say(labels.unlabel(repository, name, label), f"took {label} from", as_json)
    else:
        _say(labels.label(repository, name, label, version, force=force), f"{label} is", as_json)


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("a")
@click.argument("b")
@json_option
def diff(repository: Path, name: str, a: str, b: str, as_json: bool) -> None:
    """What differs between two versions: config, signature, sizes, model, accuracy."""
    from nemoport import show
    from nemoport.repository import compare

    rows = [{"about": row.about, "what": row.what, a: row.a, b: row.b} for row in compare.diff(repository, name, a, b)]
    show.json({"model": name, "a": a, "b": b, "differences": rows}) if as_json else show.table(rows)


@repo.command()
@repository_argument
@click.argument("name")
@json_option
def history(repository: Path, name: str, as_json: bool) -> None:
    """What was done to a model, by whom and when."""
    from nemoport import show
    from nemoport.repository import history as told
    from nemoport.repository.versions import evidence_of, state

    state(repository, name)
    events = told.read(evidence_of(repository, name) / told.FILE)
    rows: list[dict[str, Any]] = [
        {"event": each.number, "when": each.when, "by": each.by, "what": each.what, "version": each.version}
        | {"live": each.live, "details": dict(each.details)}
        for each in events
    ]
    if as_json:
        show.json({"model": name, "events": rows})
    else:
        show.table([row | {"details": _words(row["details"])} for row in rows])


@repo.command()
@repository_argument
@click.argument("name")
@release_option
@click.option("--force", is_flag=True, help="Lose what was edited in config.pbtxt by hand.")
@click.option("--keep", is_flag=True, help="Generate nothing: put the edited config.pbtxt on record as it is.")
@json_option
def config(repository: Path, name: str, runtime: Runtime | None, force: bool, keep: bool, as_json: bool) -> None:
    """Generate a model's config.pbtxt anew, from its manifest and config.values.yaml."""
    from nemoport.repository import regenerate

    if keep and (force or runtime):
        raise click.UsageError("--keep generates nothing; leave --force and --triton-release out")
    done = (
        regenerate.keep(repository, name)
        if keep
        else regenerate.regenerate(repository, name, runtime=runtime, force=force)
    )
    _say(done, "wrote the config of" if not keep else "put on record the config of", as_json)


@repo.command()
@repository_argument
@click.argument("url")
@names_option
@json_option
def push(repository: Path, url: str, names: tuple[str, ...], as_json: bool) -> None:
    """Send live and labelled versions to s3://, gs:// or file://; half a version is never visible there."""
    from nemoport import show
    from nemoport.repository import remote, transfer
    from nemoport.repository.versions import is_live, models

    chosen = names or tuple(name for name in models(repository) if is_live(repository, name))
    with show.working("pushing"):
        sent = transfer.push(repository, remote.connect(url), chosen)
    _say_sent(sent, url, as_json)


@repo.command()
@click.argument("url")
@repository_argument
@names_option
@json_option
def pull(url: str, repository: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Bring models from s3://, gs:// or file://, every byte verified."""
    from nemoport import show
    from nemoport.repository import remote, transfer

    there = remote.connect(url)
    with show.working("pulling"):
        sent = transfer.pull(there, repository, names or there.models())
    _say_sent(sent, str(repository), as_json)


@repo.command()
@click.argument("repository", metavar="REPOSITORY|URL")
@names_option
@keys_option
@json_option
def verify(repository: str, names: tuple[str, ...], keys: tuple[Path, ...], as_json: bool) -> None:
    """Compare every byte with its digest, every config with the history; with --key, every signature."""
    from nemoport import show
    from nemoport.repository import remote, signing
    from nemoport.repository import verify as verifying

    public = [signing.public_key(key) for key in keys]
    with show.working("verifying"):
        if remote.is_url(repository):
            found = verifying.verify_remote(remote.connect(repository), public, names=names or None)
        else:
            found = verifying.verify(Path(repository), public, names=names or None)
    rows = [vars(row) for row in found]
    passed = not any(row.problem for row in found)
    show.json({"passed": passed, "checked": rows}) if as_json else show.table(rows)
    if not passed:
        sys.exit(1)


@repo.command()
@repository_argument
@click.argument("name")
@click.argument("version", required=False)
@click.option("--key", type=PATH, required=True, metavar="PEM", help="A private key, Ed25519 or ECDSA P-256.")
@json_option
def sign(repository: Path, name: str, version: str | None, key: Path, as_json: bool) -> None:
    """Sign a version's build statement; without VERSION, that of the one that is served."""
    from nemoport.repository.sign import sign as run

    _say(run(repository, name, version, key), "signed", as_json)


def _say(done: Done, words: str, as_json: bool) -> None:
    from nemoport import show

    if as_json:
        row = {"model": done.model, "what": done.what, "version": done.version, "live": done.live}
        show.json(row | {"path": str(done.path), "already": done.already, "details": dict(done.details)})
        return
    version = "" if done.version is None else f" version {done.version}"
    show.line(f"{'already: ' * done.already}{words} {done.model}{version}; live: {numbers(done.live)}")


def _say_sent(sent: list[Sent], where: str, as_json: bool) -> None:
    from nemoport import show

    rows: list[dict[str, Any]] = [vars(each) for each in sent]
    show.json({"to": where, "models": rows}) if as_json else show.table(rows)


def _words(details: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:16]}" for key, value in details.items())
