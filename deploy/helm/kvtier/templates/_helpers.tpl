{{- define "kvtier.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvtier.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "kvtier.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kvtier.selector" -}}
app.kubernetes.io/name: {{ include "kvtier.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvtier.labels" -}}
{{ include "kvtier.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "kvtier.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* Bytes of a size as kvtier.toml writes it: 64GiB, 10 GB. */}}
{{- define "kvtier.bytes" -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $units := dict "B" 1 "KB" 1000 "MB" 1000000 "GB" 1000000000 "TB" 1000000000000 "KiB" 1024 "MiB" 1048576 "GiB" 1073741824 "TiB" 1099511627776 -}}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units $unit | int64) -}}
{{- end -}}

{{/* Whole seconds of a duration, rounded up: 60s, 2m, 1500ms. */}}
{{- define "kvtier.seconds" -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- div (add (mul (regexFind "^[0-9]+" . | int64) (get $units $unit | int64)) 999) 1000 -}}
{{- end -}}

{{/* Mebibytes of a number of bytes, rounded up to a multiple of two: a huge page. */}}
{{- define "kvtier.mebibytes" -}}
{{- mul (div (add (int64 .) 2097151) 2097152) 2 -}}
{{- end -}}

{{- define "kvtier.memory" -}}
{{- $overhead := include "kvtier.bytes" .Values.memory.overhead | int64 -}}
{{- $blocks := include "kvtier.bytes" .Values.config.host.capacity | int64 -}}
{{- if .Values.hugepages.enabled -}}{{- $blocks = int64 0 -}}{{- end -}}
{{- include "kvtier.mebibytes" (add $overhead $blocks) -}}Mi
{{- end -}}

{{/* What is asked for and is the limit too. */}}
{{- define "kvtier.resources" -}}
memory: {{ include "kvtier.memory" . }}
{{- if .Values.hugepages.enabled }}
hugepages-2Mi: {{ include "kvtier.mebibytes" (include "kvtier.bytes" .Values.config.host.capacity) }}Mi
{{- end }}
{{- with .Values.extraResources }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "kvtier.directory" -}}
{{- if and .Values.directory.passwordSecret.name (ne .Values.directory.kind "external") -}}
{{- fail "directory.passwordSecret is for directory.kind external: the bundled Valkey has no password, and only the NetworkPolicy protects it" -}}
{{- end -}}
{{- if eq .Values.directory.kind "bundled" -}}
redis://{{ include "kvtier.fullname" . }}-directory.{{ .Release.Namespace }}.svc:6379
{{- else if eq .Values.directory.kind "external" -}}
{{- if contains "@" .Values.directory.url -}}
{{- fail "directory.url holds a password: put it into a Secret and name that in directory.passwordSecret" -}}
{{- end -}}
{{- .Values.directory.url -}}
{{- else -}}
embedded
{{- end -}}
{{- end -}}

{{/* Whether nodes serve each other. */}}
{{- define "kvtier.clustered" -}}
{{- if ne .Values.directory.kind "embedded" -}}yes{{- end -}}
{{- end -}}

{{/* Whether a value is an array of tables. */}}
{{- define "kvtier.isTables" -}}
{{- if kindIs "slice" . -}}{{- if . -}}{{- if kindIs "map" (first .) -}}yes{{- end -}}{{- end -}}{{- end -}}
{{- end -}}

{{- define "kvtier.tomlValue" -}}
{{- if kindIs "slice" . -}}
[{{- range $i, $each := . -}}{{- if $i }}, {{ end -}}{{- include "kvtier.tomlValue" $each -}}{{- end -}}]
{{- else if kindIs "float64" . -}}
{{- int64 . -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}

{{/* TOML of a map: its plain fields, then its tables, then its arrays of tables. */}}
{{- define "kvtier.toml" -}}
{{- range $field, $value := . -}}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value) (include "kvtier.isTables" $value)) }}
{{ $field }} = {{ include "kvtier.tomlValue" $value }}
{{- end -}}
{{- end -}}
{{- range $table, $fields := . -}}
{{- if kindIs "map" $fields }}

[{{ $table }}]
{{- include "kvtier.toml" $fields -}}
{{- end -}}
{{- end -}}
{{- range $table, $each := . -}}
{{- if include "kvtier.isTables" $each -}}
{{- range $fields := $each }}

[[{{ $table }}]]
{{- include "kvtier.toml" $fields -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Refuses users that the mode of the sockets keeps out: the daemon would not start. */}}
{{- define "kvtier.tenancy" -}}
{{- $mode := dig "listen" "socket_mode" "0600" . -}}
{{- $listed := dig "operators" "uids" list . -}}
{{- range .tenants -}}
{{- $listed = concat $listed (default list .uids) -}}
{{- end -}}
{{- if and $listed (regexMatch "[01][01]$" $mode) -}}
{{- fail (printf "config.listen.socket_mode %s keeps the users of config.operators and config.tenants out: set 0660, for pods of the group security.gid, or 0666" $mode) -}}
{{- end -}}
{{- end -}}

{{/* kvtier.toml: what the values say, and what follows from the rest of them. */}}
{{- define "kvtier.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- include "kvtier.tenancy" $config -}}
{{- $bind := .Values.network.bind -}}
{{- $ports := .Values.network.ports -}}
{{- $set := dict "run_dir" "/run/kvtier" "data_dir" "/var/lib/kvtier" -}}
{{- $listen := dict "http" (printf "%s:%d" $bind (int $ports.http)) -}}
{{- if .Values.network.controlPlane -}}
{{- $_ := set $listen "grpc" (printf "%s:%d" $bind (int $ports.grpc)) -}}
{{- end -}}
{{- $_ := set $set "listen" $listen -}}
{{- if .Values.rules -}}
{{- $_ := set $set "rules" (dict "file" "/etc/kvtier/rules.toml") -}}
{{- end -}}
{{- range $tenant := $config.tenants -}}
{{- if $tenant.salt_digests -}}
{{- if not $.Values.saltKeySecret.name -}}
{{- fail (printf "saltKeySecret names no Secret: it has the key of the salt_digests of tenant %s" $tenant.id) -}}
{{- end -}}
{{- $_ := set $tenant "salt_key_file" (printf "/etc/kvtier-salts/%s" $.Values.saltKeySecret.field) -}}
{{- end -}}
{{- end -}}
{{- $cluster := dict "directory" (include "kvtier.directory" .) -}}
{{- if include "kvtier.clustered" . -}}
{{- $_ := set $cluster "listen" (printf "%s:%d" $bind (int $ports.peer)) -}}
{{- $_ := set $set "transport" (dict "tcp_listen" (printf "%s:%d" $bind (int $ports.data))) -}}
{{- end -}}
{{- if .Values.directory.passwordSecret.name -}}
{{- $_ := set $cluster "password_env" "KVTIER_DIRECTORY_PASSWORD" -}}
{{- end -}}
{{- $_ := set $set "cluster" $cluster -}}
{{- if .Values.hugepages.enabled -}}
{{- $_ := set $set "host" (dict "pages" "huge") -}}
{{- end -}}
{{- if .Values.objectStore.credentialsSecret.name -}}
{{- $_ := set $set "object" (dict "credentials_env" (list "S3_ACCESS_KEY" "S3_SECRET_KEY")) -}}
{{- end -}}
# Written by the chart {{ .Chart.Name }}; node_id and cluster.advertise come from the environment.
{{- include "kvtier.toml" (mustMergeOverwrite $config $set) }}
{{- end -}}

{{/* What vLLM takes as --kv-transfer-config. */}}
{{- define "kvtier.kvTransferConfig" -}}
{{- $extra := merge (dict "socket" "/run/kvtier/kvtierd.sock") .Values.connection.extraConfig -}}
{{- dict "kv_connector" "KvTierConnector" "kv_connector_module_path" "kvtier.connector" "kv_role" "kv_both" "kv_load_failure_policy" "recompute" "kv_connector_extra_config" $extra | toJson -}}
{{- end -}}
