#!/bin/sh
# The daemon's control as users of version 1 know it: start | stop | restart | status | health | logs, over ./ksi.
# The home is KSI_HOME, else this checkout. Further arguments go to the command: `./daemon_control.sh logs -n 100`.
set -eu

self=$0
while [ -L "$self" ]; do
    target=$(readlink "$self")
    case $target in
    /*) self=$target ;;
    *) self=${self%/*}/$target ;;
    esac
done
case $self in
*/*) here=$(CDPATH='' cd -P -- "${self%/*}" && pwd) ;;
*) here=$PWD ;;
esac

case ${1-} in
start | stop | restart | status | health | logs)
    exec "$here/ksi" --home "${KSI_HOME:-$here}" "$@"
    ;;
-h | --help | help)
    echo "Usage: $0 start|stop|restart|status|health|logs [OPTIONS]"
    ;;
*)
    echo "Usage: $0 start|stop|restart|status|health|logs [OPTIONS]" >&2
    exit 2
    ;;
esac
