#!/usr/bin/env bash
# Write the morning's page, data/report.html, and the picture data/progress.png.
#
# usage: make report [TAG=nov24]
#
# Without TAG it is about the session at hand. Open the page in a browser; it needs no network and no server.
# exit: 0 written · 1 refused, and why
. "$(dirname "$0")/lib.sh"

tag=${TAG:-}
read_git
need_python
helper show.report --tag="${tag:-$TAG}"
