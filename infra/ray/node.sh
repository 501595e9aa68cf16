#!/bin/sh
# On a node of cluster.yaml: fills ~/.venv, and writes to ~/.ray/environment how Ray starts there: with the cluster's token or not at all.
#   [TORCH=cuda] infra/ray/node.sh
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
token=$HOME/.ray/auth_token
[ -s "$token" ] || { echo "error: $token: no token; one that \`ray get-auth-token --generate\` makes before \`ray up\` is wanted" >&2; exit 2; }
chmod 600 "$token"
"$root/infra/install.sh" "$HOME/.venv" "${TORCH:-cpu}"
cat > "$HOME/.ray/environment" << END
. "$HOME/.venv/bin/activate"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0 DVC_NO_ANALYTICS=1
unset RAY_AUTH_TOKEN
ulimit -Sn "\$(ulimit -Hn)"  # a socket for each worker of each node
END
