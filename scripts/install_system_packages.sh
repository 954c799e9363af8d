#!/bin/sh
# MuJoCo renders through EGL, which is not a Python package. Installs it when it is missing and we may.
# usage: install_system_packages.sh PYTHON
set -eu
packages="libegl1 libegl-mesa0 libgl1-mesa-dri"

if "$1" -c "import ctypes; [ctypes.CDLL(name) for name in ('libEGL.so.1', 'libEGL_mesa.so.0')]" 2>/dev/null; then
    exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing $packages (rendering without a screen)"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages >/dev/null
    exit 0
fi
echo "Rendering needs EGL. Please install it, e.g.: sudo apt-get install $packages" >&2
exit 1
