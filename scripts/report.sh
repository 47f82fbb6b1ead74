#!/usr/bin/env bash
# make report [TAG=nov24]: write the morning's page, data/report.html, and the picture data/progress.png.
# Without TAG it is about the session at hand. Open the page in a browser; it needs no network and no server.
. "$(dirname "$0")/lib.sh"

tag=${TAG:-}
read_git
helper show.report --tag="${tag:-$TAG}"
