#!/bin/sh
# install.sh PYTHON VENV LOCK TOOL...: a virtual environment with the locked packages and this project in it, and
# Debian's packages for whichever of the tools is missing, where this user may install them.
set -eu
python=$1 venv=$2 lock=$3
shift 3

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: TinyFleet needs Python 3.11, 3.12 or 3.13; $python is $("$python" --version). Try: make PYTHON=python3.11" >&2
    exit 2
}

missing() { ! command -v "$1" >/dev/null 2>&1; }
allowed() { command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
log=${TMPDIR:-/tmp}/tinyfleet-apt.log
apt() {
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# Without these there is no environment, and no engine in it.
needed=
"$python" -c 'import ensurepip' 2>/dev/null || needed="$needed python3-venv"
header='import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
"$python" -c "$header" || needed="$needed python3-dev"
missing cc && needed="$needed gcc libc6-dev"
if [ -n "$needed" ]; then
    allowed || {
        echo "error: these Debian packages are needed and not installed:$needed. Try: apt-get install$needed" >&2
        exit 2
    }
    echo "installing Debian packages:$needed"
    apt $needed >"$log" 2>&1 || {
        echo "error: these could not be installed:$needed (see $log)" >&2
        exit 2
    }
fi

# Without these there is less to see. They come while Python's packages do.
packages=
for tool in "$@"; do
    case $tool in
    gcc-arm-none-eabi) missing arm-none-eabi-gcc && packages="$packages gcc-arm-none-eabi libnewlib-arm-none-eabi" ;;
    gcc-aarch64-linux-gnu) missing aarch64-linux-gnu-gcc && packages="$packages $tool libc6-dev-arm64-cross" ;;
    gcc-arm-linux-gnueabihf) missing arm-linux-gnueabihf-gcc && packages="$packages $tool libc6-dev-armhf-cross" ;;
    qemu-user) missing qemu-arm && packages="$packages qemu-user" ;;
    chromedriver) missing chromedriver && packages="$packages chromium chromium-driver" ;;
    clang) missing clang && missing clang-14 && packages="$packages clang libclang-rt-14-dev" ;;
    *) missing "$tool" && ! [ -x "/usr/sbin/$tool" ] && packages="$packages $tool" ;;
    esac
done
tools=
if [ -n "$packages" ]; then
    if allowed; then
        echo "installing Debian packages:$packages"
        apt $packages >"$log" 2>&1 &
        tools=$!
    else
        echo "not installed, and no right to install:$packages (going on without)" >&2
    fi
fi

echo "installing $lock into $venv"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$lock"
if [ -n "$tools" ] && ! wait "$tools"; then
    echo "these could not be installed:$packages (see $log); going on without" >&2
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
