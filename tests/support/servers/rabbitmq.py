"""A private RabbitMQ node, with a new virtual host for each test."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import amqp
from typing_extensions import Self

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.docker import Container
from tests.support.servers.errors import ServerFailed, ServerUnavailable
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.programs import beside

COOKIE = "celery-eda-tests"
#: Seconds after which the other nodes of a cluster take a frozen one for dead; a minute by default.
TICK = 15


class RabbitMQ(Server):
    """A RabbitMQ server with the user ``guest``, password ``guest``."""

    name: ClassVar[str] = "RabbitMQ"
    variable: ClassVar[str] = "CELERY_EDA_TEST_RABBITMQ_URL"
    packages: ClassVar[str] = "rabbitmq-server (apt)"
    start_timeout: ClassVar[float] = 90

    @classmethod
    def local(cls, root: Path) -> Self | None:
        """A new node from the programs of this machine."""
        programs = programs_of_a_node()
        return None if programs is None else cls.node(programs, root, epmd=ports.claim())

    @classmethod
    def node(cls, programs: Path, root: Path, *, epmd: int, settings: Sequence[str] = ()) -> Self:
        """A new node, which meets others by the port of their *epmd*.

        *settings* are more lines of its ``rabbitmq.conf``.
        """
        port = ports.claim()
        folder = root / f"rabbitmq-{port}"
        folder.mkdir()
        environment = _environment(programs, folder, port, epmd, settings)
        host = LocalProcess([programs / "rabbitmq-server"], folder, environment=environment)
        return cls(host, _url(port))

    @classmethod
    @contextlib.contextmanager
    def pair(cls, root: Path) -> Iterator[tuple[Self, Self]]:
        """Two running nodes of one cluster."""
        programs = programs_of_a_node()
        if programs is None:
            raise ServerUnavailable(f"No {cls.name} here: install {cls.packages}.")
        epmd = ports.claim()
        first, second = (cls.node(programs, root, epmd=epmd) for _ in range(2))
        with first, second:
            second.ctl("stop_app")
            second.ctl("join_cluster", first.node_name)
            second.ctl("start_app")
            yield first, second

    @property
    def node_name(self) -> str:
        """The name by which Erlang knows this node."""
        return f"eda{self.port}@localhost"

    @classmethod
    def container(cls) -> Self:
        """A new node in Docker."""
        port = ports.claim()
        return cls(Container("rabbitmq:4", port, 5672), _url(port))

    def login(self) -> None:
        """Open and close an AMQP connection."""
        url = urlsplit(self.url)
        with amqp.Connection(
            host=f"{url.hostname}:{url.port}",
            userid=unquote(url.username or "guest"),
            password=unquote(url.password or "guest"),
            virtual_host=unquote(url.path[1:]) or "/",
            connect_timeout=2,
            read_timeout=2,
            write_timeout=2,
        ):
            pass

    def kill(self) -> None:
        """SIGKILL all its processes; queues declared and messages confirmed by now stay."""
        self._flush()
        super().kill()

    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open and nobody answers."""
        self._flush()
        super().freeze()

    def vhost(self, name: str) -> str:
        """The URL of a new virtual host; an older one of that name is deleted.

        A node that is not ours has one virtual host for all tests, that of its URL.
        """
        if not self.disposable:
            return self.url
        self.drop(name)
        self.evaluate(
            f'ok = rabbit_vhost:add(<<"{name}">>, <<"tests">>),'
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"{name}">>,'
            ' <<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{quote(name, safe='')}"))

    def drop(self, name: str) -> None:
        """Delete a virtual host of ours with all that is in it."""
        if self.disposable:
            self.evaluate(
                f'case rabbit_vhost:exists(<<"{name}">>) of'
                f' true -> ok = rabbit_vhost:delete(<<"{name}">>, <<"tests">>); false -> ok end'
            )

    def evaluate(self, expression: str) -> str:
        """Run Erlang expressions in the node; the value of the last one, as text.

        ``erl_call`` takes 10 ms for it, ``rabbitmqctl eval`` 400.
        """
        if not shutil.which("erl_call") or not isinstance(self.host, LocalProcess):
            return self.ctl("eval", f"{expression}.").rstrip()
        # -r: a name of its own, or a call is refused while the one before it says good-bye.
        call = ["erl_call", "-r", "-sname", self.node_name, "-c", COOKIE, "-e"]
        answer = self.host.run(call, f"{expression}.\n")
        if not answer.startswith("{ok, "):
            raise ServerFailed(f"{self.name} could not evaluate {expression}: {answer}")
        return answer[5:-1]

    def ctl(self, *words: str) -> str:
        """Run ``rabbitmqctl`` against this node; what it printed."""
        return self.host.run(["rabbitmqctl", *words])

    def _flush(self) -> None:
        """Have the node's log of declarations on disk.

        Mnesia writes there at once that a queue is to be declared, but up to 2 s later that it was
        (seen with 3.10: a commit "presume_abort" without its decision). A node killed in between
        forgets the queue with its confirmed messages, which is not what the tests are about.
        """
        if self.host.alive and not self.host.frozen:
            with contextlib.suppress(ServerFailed):  # it is not up yet
                self.evaluate("sys:get_state(mnesia_recover), disk_log:sync(latest_log)")


def _url(port: int) -> str:
    return f"amqp://guest:guest@127.0.0.1:{port}//"


def _environment(
    programs: Path, folder: Path, port: int, epmd: int, settings: Sequence[str]
) -> dict[str, str]:
    """Everything that tells this node from another one on the same machine."""
    cookie = folder / ".erlang.cookie"
    cookie.write_text(COOKIE)
    cookie.chmod(0o400)  # Erlang refuses a cookie that others can read
    (folder / "plugins").write_text("[].")
    place = [f"listeners.tcp.1 = 127.0.0.1:{port}", "disk_free_limit.absolute = 50MB"]
    (folder / "rabbitmq.conf").write_text("".join(f"{line}\n" for line in (*place, *settings)))
    return {
        "HOME": str(folder),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd),
        "ERL_CRASH_DUMP_BYTES": "0",
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_DIST_PORT": str(ports.claim()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_NODENAME": f"eda{port}@localhost",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            f"-kernel inet_dist_use_interface {{127,0,0,1}} -kernel net_ticktime {TICK}"
        ),
    }


def programs_of_a_node() -> Path | None:
    """The folder with the node's own scripts.

    Debian's ``/usr/sbin/rabbitmq-server`` is a wrapper that changes the user and the home.
    """
    # Not asked for its version: "rabbitmq-server --version" starts a server.
    for folder in [Path("/usr/lib/rabbitmq/bin"), *beside("rabbitmq-server")]:
        if (folder / "rabbitmq-server").exists():
            return folder
    return None
