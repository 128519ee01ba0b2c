"""``i2v-lab lab`` as a real server, under a user's configuration that opens servers to everybody."""

from __future__ import annotations

import contextlib
import http.client
import urllib.parse

import psutil
import pytest
from lab_server import lab_server

from i2v_lab.cli.lab import check_options
from i2v_lab.errors import InvalidRequest

OPEN = """
c.IdentityProvider.token = ""
c.ServerApp.token = ""
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.allow_origin = "*"
c.ServerApp.allow_remote_access = True
c.ServerApp.disable_check_xsrf = True
"""
# In each file that the server reads; and by the older names alone, which it copies to the newer.
FILES = {
    "both": {"jupyter_lab_config.py": OPEN, "jupyter_server_config.py": OPEN},
    "older": {"jupyter_config.py": 'c.ServerApp.token = ""\nc.ServerApp.ip = "*"\n'},
}


def _asked(url: str, **headers: str) -> tuple[int, str | None]:
    """Status, and the origin that may read the answer."""
    address = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(address.netloc, timeout=10)) as connection:
        connection.request("GET", f"{address.path}?{address.query}", headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers["Access-Control-Allow-Origin"] or None


@pytest.mark.parametrize("files", FILES)
def test_a_configuration_without_a_token_leaves_a_server_with_one_for_this_machine(files, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_TOKEN", "")
    folder = tmp_path / "jupyter_config_dir"
    folder.mkdir()
    for name, text in FILES[files].items():
        (folder / name).write_text(text)
    with lab_server(tmp_path, {}, keep_forecasts=True) as server:
        base, _, token = server.url.partition("/lab")[0], *server.url.partition("?token=")[1:]
        assert len(token) >= 48
        assert _asked(f"{base}/api/contents") == (403, None)
        assert _asked(f"{base}/api/contents", Origin="http://example.org") == (404, None)
        assert _asked(f"{base}/api/contents?token={token}", Host="example.org") == (403, None)
        assert _asked(f"{base}/api/contents?token={token}") == (200, None)
        listening = [each for each in server.process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        assert {each.laddr.ip for each in listening} == {"127.0.0.1"}
        said = [line for line in server.log if line.startswith("i2v-lab: ")]
        assert 1 <= len(said) <= 2


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--ip=0.0.0.0"], "ssh -L"),
        (["--ip", "0.0.0.0"], "ssh -L"),
        (["--ServerApp.ip=*"], "ssh -L"),
        (["--ServerApp.allow_origin=*"], "ssh -L"),
        (["--sock=a"], "ssh -L"),
        (["--notebook-dir=a"], "copies of the notebooks"),
        (["--ServerApp.root_dir", "a"], "copies of the notebooks"),
        (["--LabApp.default_url=/tree"], "set already by i2v-lab lab"),
        (["--LabApp.extension_manager=pypi"], "set already by i2v-lab lab"),
        (["--ServerApp.tornado_settings={}"], "set already by i2v-lab lab"),
        (["my.ipynb"], "is a file or a folder"),
        (["--allow-root", "my.ipynb"], "is a file or a folder"),
        (["--port=1", "folder"], "is a file or a folder"),
    ],
)
def test_an_option_that_is_set_already_is_refused_in_one_line(options, what):
    with pytest.raises(InvalidRequest, match=what) as refused:
        check_options(["--no-browser", "--port", "8899", *options])
    assert refused.value.fields == {
        "option": next(each for each in options if each not in ("--allow-root", "--port=1"))
    }
    assert "\n" not in str(refused.value)
    check_options(["--no-browser", "--port", "8899", "--allow-root", "--log-level", "ip", "--notebook-version=1"])
