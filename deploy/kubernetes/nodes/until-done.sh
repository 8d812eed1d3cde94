#!/bin/sh
# until-done.sh COMMAND…: runs a command that ends with 0 both when it is done and when it was asked to stop. A Job takes
# 0 for done, so that a pod of a drained node would not be replaced: after SIGTERM, 0 becomes 143.
stopped=
child=
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child"' TERM INT
"$@" &
child=$!
if [ -n "$stopped" ]; then  # before there was somebody to tell
    kill -TERM "$child"
fi
wait "$child"
code=$?
# A trapped signal ends `wait` early.
while kill -0 "$child" 2> /dev/null; do
    wait "$child"
    code=$?
done
if [ -n "$stopped" ] && [ "$code" = 0 ]; then
    code=143
fi
exit "$code"
