#!/bin/sh
# Writes what compose and Kubernetes need as secrets: the stream's CURVE keys, the token of the page, and Grafana's
# password. `sluice-producer` must be on the PATH; it is in the image.
#   secrets.sh DIR [UID]      UID: who will read them, such as 10001, the image's user; only root can give files away
set -eu
umask 077
dir=${1:?usage: secrets.sh DIR [UID]}
uid=${2:-}
if [ -e "$dir/keys" ]; then
    echo "$dir holds keys already; choose another folder, or remove it first" >&2
    exit 2
fi
sluice-producer keys "$dir/keys"
for name in token grafana_password; do
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$dir/$name"
done
if [ -n "$uid" ]; then
    chown -R "$uid:$uid" "$dir"
fi
echo "secrets written to $dir"
