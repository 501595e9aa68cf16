"""A real MLflow server on a PostgreSQL of its own, on loopback, through ``infra/mlflow/server.sh``; and what is in both."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from small_heads import CHECKOUT

SCRIPT = CHECKOUT / "infra/mlflow/server.sh"


class RealServer:
    """Up from :meth:`up` to :meth:`down`; its data stays in between, until :meth:`remove`."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="lodbrain-mlflow-", dir="/tmp"))  # PostgreSQL's account reaches no folder of pytest's
        self.port, self.pg_port = _free_port(), _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MLFLOW_"))}
        own = {"LODBRAIN_MLFLOW_HOME": str(self.home), "MLFLOW_PORT": str(self.port), "PGPORT": str(self.pg_port)}
        self.environment = kept | own | {"OMP_NUM_THREADS": "1"}

    def script(self, word: str) -> subprocess.CompletedProcess:
        """Run the script."""
        return subprocess.run([SCRIPT, word], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)

    def up(self) -> None:
        done = self.script("up")
        assert done.returncode == 0, done.stdout

    def kill(self) -> None:
        """kill -9 of the server and its workers, as a crash of its machine; PostgreSQL goes on."""
        os.killpg(self.pid, signal.SIGKILL)

    def be_dead_unwaited(self) -> None:
        """What a killed server is for a while, and in a container without an init for ever: a dead process that nobody has waited for."""
        self.unwaited = subprocess.Popen(["true"])  # kept: Python waits for a process whose object goes
        os.waitid(os.P_PID, self.unwaited.pid, os.WEXITED | os.WNOWAIT)
        shown = ["ps", "-o", "lstart=", "-p", str(self.unwaited.pid)]
        (self.home / "mlflow.pid").write_text(f"{self.unwaited.pid} {subprocess.check_output(shown, text=True)}")

    @property
    def pid(self) -> int:
        return int((self.home / "mlflow.pid").read_text().split()[0])

    def remove(self) -> None:
        self.script("down")
        shutil.rmtree(self.home)

    def count(self, table: str) -> int:
        """Rows of one of MLflow's tables."""
        import psycopg2

        password = (self.home / "pgpass").read_text().strip().rpartition(":")[2]
        connection = psycopg2.connect(host="127.0.0.1", port=self.pg_port, user="lodbrain", dbname="mlflow", password=password)
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"select count(*) from {table}")
                return cursor.fetchone()[0]
        finally:
            connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
