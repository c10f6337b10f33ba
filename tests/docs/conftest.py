"""The site of the docs, built once for the tests of a worker."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def build_site():
    """Function that builds the site strictly into a folder, from other docs if they are given."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"needs {name}: pip install 'drcnn[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def make(site: Path, docs: Path = ROOT / "docs") -> Path:
        config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site))
        assert config.strict
        config.plugins.on_startup(command="build", dirty=False)
        try:
            build(config)
        finally:
            config.plugins.on_shutdown()
        return site

    return make


@pytest.fixture(scope="session")
def site(build_site, tmp_path_factory) -> Path:
    """Folder of the built site."""
    return build_site(tmp_path_factory.mktemp("site"))
