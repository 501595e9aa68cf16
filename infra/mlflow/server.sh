#!/bin/sh
# An MLflow server on PostgreSQL, without docker.
#   infra/mlflow/server.sh up|down|status
# Settings are environment variables, MLflow's and PostgreSQL's own names where they have one:
#   LODBRAIN_MLFLOW_HOME           state: process ids, logs, artifacts, PostgreSQL's data   (~/lodbrain-mlflow)
#   MLFLOW_HOST, MLFLOW_PORT       where it listens   (127.0.0.1, 5000); it knows no users: who reaches it may read and write
#   MLFLOW_SERVER_ALLOWED_HOSTS    names by which browsers and jobs may call it, with ports   (localhost and 127.0.0.1, any port: SSH tunnels)
#   MLFLOW_WORKERS                 processes that answer   (2)
#   MLFLOW_ARTIFACTS_DESTINATION   s3://bucket/folder, with AWS_PROFILE, AWS_ENDPOINT_URL, …, or a folder   ($LODBRAIN_MLFLOW_HOME/artifacts)
#   PGSERVICE or PGHOST            a PostgreSQL that runs already, with PGPORT, PGUSER, PGDATABASE and PGPASSFILE: no password on a command line.
#                                  Without both, one of its own is started on 127.0.0.1, port PGPORT (15432), its password in PGPASSFILE.
# up: exit status 0 once it answers. status: 0 it answers, 3 it does not. Everything is stopped by its process id.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
home=${LODBRAIN_MLFLOW_HOME:-$HOME/lodbrain-mlflow}
host=${MLFLOW_HOST:-127.0.0.1} port=${MLFLOW_PORT:-5000}
data=$home/postgres log=$home/mlflow.log pid_file=$home/mlflow.pid
case $host in 0.0.0.0) url=http://127.0.0.1:$port ;; *) url=http://$host:$port ;; esac
[ -x "$root/.venv/bin/mlflow" ] && PATH=$root/.venv/bin:$PATH

die() { echo "error: $*" >&2; exit 1; }
answers() { python -c "import urllib.request as u; u.urlopen('$url/health', timeout=5)" 2>/dev/null; }
# Number and start of a process, unless it is dead and only not yet waited for (Z); a number alone may meanwhile be another's.
process() { echo "$1 $(ps -o stat=,lstart= -p "$1" | sed -n '/^[^Z]/s/^[^ ]* *//p')"; }
running() { [ -f "$pid_file" ] && read -r pid _ <"$pid_file" && [ "$(process "$pid")" = "$(cat "$pid_file")" ]; }
# PostgreSQL does not run as root: then it is the account's that Debian makes for it.
as_postgres() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=postgres --regid=postgres --init-groups env HOME=/ "$@"; else "$@"; fi; }
own_postgres() { [ -z "${PGSERVICE:-}${PGHOST:-}" ]; }

find_postgres() {
    command -v initdb >/dev/null && command -v createdb >/dev/null ||
        PATH=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1):$PATH
    command -v initdb >/dev/null || die "initdb is not here; PostgreSQL is wanted (Debian: apt-get install postgresql), or PGHOST of one that runs"
}

start_postgres() {
    find_postgres
    export PGPORT="${PGPORT:-15432}" PGUSER=lodbrain PGPASSFILE="$home/pgpass"
    if [ ! -f "$data/PG_VERSION" ]; then
        rm -rf "$data" && mkdir "$data"
        secret=$(od -An -tx1 -N24 /dev/urandom | tr -d ' \n')
        (umask 077 && echo "127.0.0.1:*:*:lodbrain:$secret" >"$PGPASSFILE" && echo "$secret" >"$data.secret")
        [ "$(id -u)" != 0 ] || chown postgres: "$data" "$data.secret"
        (cd / && as_postgres initdb -D "$data" -U lodbrain -A scram-sha-256 --pwfile="$data.secret" -E UTF8 --locale=C.UTF-8) >"$home/initdb.log" 2>&1 ||
            { tail -n 5 "$home/initdb.log" >&2; rm -rf "$data" "$data.secret"; die "PostgreSQL's data cannot be made in $data"; }
        rm "$data.secret"
    fi
    (cd / && as_postgres pg_ctl -D "$data" status >/dev/null) ||
        (cd / && as_postgres pg_ctl -D "$data" -w -l "$data/server.log" -o "-p $PGPORT -c listen_addresses=127.0.0.1 -c unix_socket_directories=" start) \
            >"$home/pg_ctl.log" 2>&1 || { as_postgres tail -n 3 "$data/server.log" >&2; die "PostgreSQL does not start on 127.0.0.1:$PGPORT (PGPORT)"; }
    export PGHOST=127.0.0.1 PGDATABASE=mlflow
    PGDATABASE=postgres psql -Atc "select 1 from pg_database where datname = 'mlflow'" | grep -q 1 || createdb mlflow
}

up() {
    command -v mlflow >/dev/null || die "mlflow is not here; activate the environment that has it"
    python -c 'import psycopg2' 2>/dev/null || die "psycopg2 is not here; pip install 'lodbrain[server]' is wanted"
    running && { echo "$url: runs already"; exit 0; }
    answers && die "$url: another server answers there; MLFLOW_PORT=… chooses another port"
    mkdir -p "$home" && chmod 711 "$home"
    if own_postgres; then start_postgres; fi
    export MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://  # all else libpq finds in its own variables and in PGPASSFILE
    export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    setsid mlflow server --host "$host" --port "$port" --workers "${MLFLOW_WORKERS:-2}" --serve-artifacts \
        --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:-$home/artifacts}" \
        --allowed-hosts "${MLFLOW_SERVER_ALLOWED_HOSTS:-localhost,localhost:*,127.0.0.1,127.0.0.1:*}" </dev/null >>"$log" 2>&1 &
    process $! >"$pid_file"
    for _ in $(seq 120); do
        running || break
        if answers; then echo "$url: up; resources.mlflow_uri: $url; log: $log"; exit 0; fi
        sleep 0.5
    done
    tail -n 15 "$log" >&2
    down
    die "$url: does not come up; the end of $log stands above"
}

down() {
    if running; then
        kill "$pid"
        for _ in $(seq 60); do running || break; sleep 0.25; done
        ! running || kill -KILL -- "-$pid" || :
    fi
    rm -f "$pid_file"
    if [ -f "$data/postmaster.pid" ]; then
        find_postgres
        (cd / && as_postgres pg_ctl -D "$data" -w -m fast stop) >/dev/null || die "PostgreSQL in $data does not stop"
    fi
    echo "$url: down"
}

status() {
    if running && answers; then echo "$url: up, process $pid"; else echo "$url: does not answer"; exit 3; fi
}

case ${1:-} in up|down|status) "$1" ;; *) echo "usage: $0 up|down|status" >&2; exit 2 ;; esac
