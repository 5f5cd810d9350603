#!/usr/bin/env bash
# Generated. Builds {{ build.kind }} from ./{{ artifact }} into ./{{ product }}, which is complete once it is there.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

fail() {
  echo "Error: $*" >&2
  exit {{ lacks }}
}

if [[ -e {{ product }} ]]; then
  echo "$PWD/{{ product }} is there already; remove it to build again" >&2
  exit 0
fi
{% for program in build.programs %}
command -v {{ program.name | quoted }} > /dev/null ||
  fail {{ (program.name ~ " is not on PATH; " ~ program.way_out) | quoted }}
{% endfor %}

{% for fact in build.facts %}
{{ fact.name }}="$({{ fact.command }})" || fail {{ ("what " ~ fact.name ~ " is here cannot be told; " ~ fact.way_out) | quoted }}
case "${{ fact.name }}" in
  {{ fact.accepted | join(" | ") }}) ;;
  *) fail "{{ fact.name }} is ${{ fact.name }} here; "{{ fact.way_out | quoted }} ;;
esac
{% endfor %}

rm -rf .{{ product }} {{ facts_file }}
mkdir .{{ product }} 2> /dev/null || fail "$PWD cannot be written by user $(id -u); let the user who builds own it"
trap 'rm -rf .{{ product }}' EXIT
{% for command in commands %}
{{ command }}
{% endfor %}

{
{% for fact in build.facts %}
  echo "{{ fact.name }} ${{ fact.name }}"
{% endfor %}
} > .{{ facts_file }}
sync
mv .{{ facts_file }} {{ facts_file }}
mv .{{ product }} {{ product }}
