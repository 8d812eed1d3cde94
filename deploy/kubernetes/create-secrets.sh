#!/bin/sh
# create-secrets.sh DIR [OPTION…]: makes the secrets that the pods mount, in the namespace sluice, from what
# deploy/secrets.sh has written to DIR. Options go to kubectl.
set -eu
dir=${1:?usage: create-secrets.sh DIR [OPTION…]}
shift
create() {
    kubectl --namespace sluice create secret generic "$@"
}
create sluice-trainer-keys "$@" \
    --from-file="$dir/keys/server.key" --from-file="$dir/keys/server.key_secret" \
    --from-file="$dir/keys/clients/client.key"
echo "---"
create sluice-producer-keys "$@" \
    --from-file="$dir/keys/server.key" --from-file="$dir/keys/client.key_secret"
echo "---"
create sluice-token "$@" --from-file="$dir/token"
