"""poold: the command, and the daemon's life from start to drain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gateway.version import VERSION

EPILOG = """\b
Examples:
  poold                                      # with /etc/poold/poold.toml if it is there, else the defaults
  poold --state-dir ./state --socket ./poold.sock --listen 127.0.0.1:7070
  poold --backend process                    # no Docker engine needed
  poold --check-config --config poold.toml   # 0 if it is valid; else says what is wrong, and where
  poold --print-config > poold.toml          # every key with its default
\b
Signals: TERM and INT drain and stop (a second one stops at once), HUP reads the configuration again.
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.option("-c", "--config", "config_path", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--check-config", is_flag=True, help="Check the configuration and exit.")
@click.option("--print-config", is_flag=True, help="Print a configuration with every key and its default, and exit.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where functions and code are kept.")
@click.option("--socket", type=click.Path(path_type=Path), help="The Unix socket to administer by.")
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Take HTTP here; repeatable. Port 0: any.")
@click.option("--backend", type=click.Choice(["auto", "docker", "process", "simulated"]), help="What runs instances.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much is logged.")
@click.version_option(VERSION, prog_name="poold")
def main(
    config_path: Path | None,
    check_config: bool,
    print_config: bool,
    **overrides: Any,
) -> None:
    """Keep warm pools of pre-started containers, one pool per function, and answer invocations from them."""
    from gateway.config import DEFAULT_PATH, ConfigError, config_text, load_config

    if print_config:
        click.echo(config_text(), nl=False)
        return
    if config_path is None and DEFAULT_PATH.is_file():
        config_path = DEFAULT_PATH
    try:
        config = load_config(config_path)
    except ConfigError as exc:
        click.echo(f"poold: {exc}", err=True)
        sys.exit(2)
    if check_config:
        click.echo(f"{config_path or 'the defaults'}: valid")
        return
    from gateway.service import run_daemon

    sys.exit(run_daemon(config_path, config, {key: value for key, value in overrides.items() if value}))


if __name__ == "__main__":
    main()
