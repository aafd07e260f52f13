#!/usr/bin/env bash
# Tests the dashboard in the distribution's Chromium: run.sh PROGRAM WORKFOLDER
#
# Installs Chromium (apt) and two packages (npm) where they are missing and can be had; says loudly what
# was left out where they cannot. FIGURES=DIR also takes the pictures of the documentation.
set -euo pipefail

program=$(realpath "$1")
work=$2
here=$(cd "$(dirname "$0")" && pwd)

skip() {
    echo '=============================================================='
    echo "SKIPPED: the dashboard in a browser: $1"
    echo '=============================================================='
    exit 0
}

find_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome || true; }

command -v node >/dev/null && command -v npm >/dev/null || skip 'no node or npm'
(($(node -p 'process.versions.node.split(".")[0]') >= 20)) || skip 'node is older than 20'
chromium=$(find_chromium)
if [ -z "$chromium" ] && command -v apt-get >/dev/null; then
    root=
    if [ "$(id -u)" != 0 ]; then root='sudo -n'; fi
    apt="$root env DEBIAN_FRONTEND=noninteractive apt-get"
    if ${root:-true} true 2>/dev/null; then
        install="$apt install -y --no-install-recommends chromium"
        $install </dev/null >/dev/null || { $apt update </dev/null >/dev/null && $install </dev/null >/dev/null; } || true
    fi
    chromium=$(find_chromium)
fi
[ -n "$chromium" ] || skip 'no Chromium; on Debian and Ubuntu: apt-get install chromium'

figures=
if [ -n "${FIGURES:-}" ]; then figures=$(realpath "$FIGURES"); fi
mkdir -p "$work"
cp "$here"/*.mjs "$here"/package.json "$here"/package-lock.json "$work"/
cd "$work"
if ! [ -d node_modules/playwright-core ] || ! [ -d node_modules/axe-core ]; then
    npm ci --no-audit --no-fund --ignore-scripts </dev/null || skip 'npm could not install playwright-core and axe-core'
fi
MAMBABYTE="$program" CHROMIUM="$chromium" FIGURES="$figures" \
    timeout 420 node --test --test-reporter=spec dashboard.test.mjs
