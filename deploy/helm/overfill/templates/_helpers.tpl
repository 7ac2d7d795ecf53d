{{- define "overfill.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 45 | trimSuffix "-" }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" }}{{ end -}}
{{- end -}}
{{- end }}

{{/* gRPC ports by component, as a JSON object. A component "colocated" has both stages. */}}
{{- define "overfill.ports" -}}
{{ dict "router" 7600 "prefill" 7601 "decode" 7602 "colocated" 7603 | toJson }}
{{- end }}

{{/* Port of a prefill worker's first rank; the others have the next ones. */}}
{{- define "overfill.dataPort" -}}
7610
{{- end }}

{{/* Number of ranks of a pool's workers. Argument: the pool's values. */}}
{{- define "overfill.ranks" -}}
{{ index .settings "tensor-parallel-size" | default 1 | int }}
{{- end }}

{{/* Components that have pods, as a JSON list. */}}
{{- define "overfill.components" -}}
{{- $components := list -}}
{{- range include "overfill.pools" . | fromJsonArray }}{{ $components = append $components .component }}{{ end -}}
{{ $components | uniq | toJson }}
{{- end }}

{{/*
Pools of the stack, as a JSON list. Each has a name, a component, a port, values, the pairs that its pods read, and a tier,
which is empty unless the values name tiers. A tier's values are those of `decode` with its own ones over them. Workers with
both stages decode in the default tier; with them, a pool of 0 workers is left out.
*/}}
{{- define "overfill.pools" -}}
{{- $ports := include "overfill.ports" . | fromJson -}}
{{- $pairs := include "overfill.pairs" . | fromJsonArray -}}
{{- $pools := list (dict "name" "router" "component" "router" "port" $ports.router "tier" "" "values" .Values.router "pairs" $pairs) -}}
{{- $both := gt (int .Values.colocated.replicas) 0 -}}
{{- if $both -}}
{{- $default := first $pairs -}}
{{- $values := deepCopy .Values.colocated -}}
{{- $_ := set $values "autoscaling" (dict "kind" "none") -}}
{{- range $key, $name := dict "ttftObjective" "ttft-objective" "itlObjective" "itl-objective" -}}
{{- $objective := index (index $.Values.tiers $default.tier | default dict) $key | default (index $.Values.router.settings $name) -}}
{{- if and $objective (not (hasKey $values.settings $name)) }}{{ $_ := set $values.settings $name $objective }}{{ end -}}
{{- end -}}
{{- $pools = append $pools (dict "name" "colocated" "component" "colocated" "port" $ports.colocated "tier" $default.tier "values" $values "pairs" (list $default)) -}}
{{- end -}}
{{- $others := list (dict "name" "prefill" "component" "prefill" "port" $ports.prefill "tier" "" "values" .Values.prefill "pairs" (list (first $pairs))) -}}
{{- range $pairs -}}
{{- $values := deepCopy $.Values.decode -}}
{{- $name := "decode" -}}
{{- if .tier -}}
{{- $name = printf "decode-%s" .tier -}}
{{- $_ := include "overfill.overwrite" (dict "base" $values "own" (omit (index $.Values.tiers .tier) "pair" "revision" "fallback" "ttftObjective" "itlObjective")) -}}
{{- end -}}
{{- $others = append $others (dict "name" $name "component" "decode" "port" $ports.decode "tier" .tier "values" $values "pairs" (list .)) -}}
{{- end -}}
{{- range $others -}}
{{- if and $both (ne .values.autoscaling.kind "none") }}{{ fail (printf "%s: autoscaling.kind %s conflicts with colocated.replicas: a stack of workers with both stages has a fixed number of workers" .name .values.autoscaling.kind) }}{{ end -}}
{{- if or (not $both) (gt (int .values.replicas) 0) }}{{ $pools = append $pools . }}{{ end -}}
{{- end -}}
{{ toJson $pools }}
{{- end }}

{{/* Pools of workers, as "overfill.pools". */}}
{{- define "overfill.workerPools" -}}
{{- $pools := list -}}
{{- range include "overfill.pools" . | fromJsonArray }}{{ if ne .component "router" }}{{ $pools = append $pools . }}{{ end }}{{ end -}}
{{ toJson $pools }}
{{- end }}

{{/* Writes the values of `own` over those of `base`. Sprig's mergeOverwrite would skip 0, false and "". */}}
{{- define "overfill.overwrite" -}}
{{- $base := .base -}}
{{- range $key, $value := .own -}}
{{- if and (kindIs "map" $value) (kindIs "map" (index $base $key)) -}}
{{- $_ := include "overfill.overwrite" (dict "base" (index $base $key) "own" $value) -}}
{{- else -}}
{{- $_ := set $base $key $value -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Number of a pool's pods, or its minimum. Argument: the pool's values. */}}
{{- define "overfill.replicas" -}}
{{ ternary .replicas .autoscaling.minReplicas (eq .autoscaling.kind "none") }}
{{- end }}

{{/*
Pairs of the stack, as a JSON list with the default tier's first. Each has a tier, a folder in the pods, and a source: the name
of a pair, or repository and revision.
*/}}
{{- define "overfill.pairs" -}}
{{- $pair := .Values.pair -}}
{{- $pairs := list -}}
{{- if .Values.tiers -}}
{{- $tiers := keys .Values.tiers | sortAlpha -}}
{{- $default := index .Values.router.settings "default-tier" | default (ternary "default" (first $tiers) (has "default" $tiers)) -}}
{{- if not (has $default $tiers) }}{{ fail (printf "router.settings.default-tier: there is no tier %s in tiers" $default) }}{{ end -}}
{{- range prepend (without $tiers $default) $default -}}
{{- $own := index $.Values.tiers . -}}
{{- $folder := ternary (printf "/pair/%s" $own.pair) (printf "/pair/%s" .) (eq $pair.source "claim") -}}
{{- $pairs = append $pairs (dict "tier" . "folder" $folder "id" $own.pair "revision" ($own.revision | default $pair.hub.revision)) -}}
{{- end -}}
{{- else -}}
{{- $folder := ternary (printf "/pair/%s" $pair.claim.path | trimSuffix "/") "/pair/link" (eq $pair.source "claim") -}}
{{- $pairs = list (dict "tier" "" "folder" $folder "id" (ternary $pair.hub.repository $pair.named.name (eq $pair.source "hub")) "revision" $pair.hub.revision) -}}
{{- end -}}
{{ toJson $pairs }}
{{- end }}

{{/* The tiers as a router's --tiers; empty with one pair, unless its decoder is loaded in another format. */}}
{{- define "overfill.tiers" -}}
{{- $tiers := list -}}
{{- $pools := include "overfill.workerPools" . | fromJsonArray -}}
{{- range $pair := include "overfill.pairs" . | fromJsonArray -}}
{{- $tier := $pair.tier -}}
{{- $settings := "" -}}
{{- $count := 0 -}}
{{- range $pools -}}
{{- if and (ne .component "prefill") (eq .tier $tier) -}}
{{- if not $count }}{{ $settings = omit .values.settings "ttft-objective" "itl-objective" "max-num-batched-tokens" }}{{ end -}}
{{- $count = add $count (include "overfill.replicas" .values | int) -}}
{{- end -}}
{{- end -}}
{{- if kindIs "string" $settings }}{{ fail (printf "tiers.%s.replicas: at least 1; only the default tier may have none, with colocated.replicas" $tier) }}{{ end -}}
{{- if or $tier (hasKey $settings "quantize") -}}
{{- $own := index $.Values.tiers $tier | default dict -}}
{{- $text := printf "%s=%s:%d" ($tier | default "default") $pair.folder (int $count) -}}
{{- range $key, $name := dict "fallback" "fallback" "ttftObjective" "ttft-objective" "itlObjective" "itl-objective" -}}
{{- with index $own $key }}{{ $text = printf "%s,%s=%s" $text $name (include "overfill.value" .) }}{{ end -}}
{{- end -}}
{{- range $key, $value := $settings }}{{ $text = printf "%s,%s=%s" $text $key (include "overfill.value" $value) }}{{ end -}}
{{- if or (contains ";" $text) (contains "," $pair.folder) }}{{ fail (printf "tiers.%s: neither pair nor settings may have a semicolon, nor the pair a comma" $tier) }}{{ end -}}
{{- $tiers = append $tiers $text -}}
{{- end -}}
{{- end -}}
{{ join ";" $tiers }}
{{- end }}

{{/* Labels of a selector; they never change within a release. Arguments: root, component, and tier, of pools of tiers. */}}
{{- define "overfill.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .tier }}
overfill.io/tier: {{ . }}
{{- end }}
{{- end }}

{{/* PromQL matchers of this release's series, by labels that the PodMonitor adds. Arguments: root, and a pool's tier. */}}
{{- define "overfill.series" -}}
{{- $selector := include "overfill.selector" (dict "root" .root "component" "") | fromYaml -}}
{namespace={{ .root.Release.Namespace | quote }}
{{- range $label, $value := $selector }}, {{ regexReplaceAll "[^a-z]" $label "_" }}={{ $value | quote }}{{ end -}}
{{- with .tier }}, tier={{ . | quote }}{{ end -}}
}
{{- end }}

{{- define "overfill.labels" -}}
{{ include "overfill.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: overfill
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Arguments: root, image (of a pool). */}}
{{- define "overfill.image" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .image.repository }}:{{ .image.tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "overfill.tlsSecret" -}}
{{ .Values.tls.secretName | default (printf "%s-tls" (include "overfill.fullname" .)) }}
{{- end }}

{{/* Secret with the certificate of clients: that of `helm test`, and the one that the notes tell users to export. */}}
{{- define "overfill.clientTlsSecret" -}}
{{ .Values.tls.clientSecretName | default (printf "%s-client-tls" (include "overfill.fullname" .)) }}
{{- end }}

{{- define "overfill.checkTls" -}}
{{- $ways := list -}}
{{- if .Values.tls.secretName }}{{ $ways = append $ways "tls.secretName" }}{{ end -}}
{{- if .Values.tls.certManager.enabled }}{{ $ways = append $ways "tls.certManager.enabled" }}{{ end -}}
{{- if .Values.tls.generate }}{{ $ways = append $ways "tls.generate" }}{{ end -}}
{{- if eq (len $ways) 0 }}{{ fail "no certificate: processes do not listen beyond loopback without one. Give tls.secretName, tls.certManager.enabled or tls.generate" }}{{ end -}}
{{- if and (gt (len $ways) 1) (ne (join "," $ways) "tls.secretName,tls.generate") }}{{ fail (printf "several certificates: %s. Keep one" (join ", " $ways)) }}{{ end -}}
{{- if and .Values.tls.clientSecretName (not .Values.tls.secretName) }}{{ fail "tls.clientSecretName: only with tls.secretName; Helm or cert-manager makes both certificates" }}{{ end -}}
{{- end }}

{{- define "overfill.keysSecret" -}}
{{ .Values.apiKeys.secretName | default (printf "%s-keys" (include "overfill.fullname" .)) }}
{{- end }}

{{- define "overfill.checkKeys" -}}
{{- if not (or .Values.apiKeys.secretName .Values.apiKeys.generate) }}{{ fail "no API keys: routers do not listen beyond loopback without them. Give apiKeys.secretName or apiKeys.generate" }}{{ end -}}
{{- end }}

{{/* Refuses an upgrade after which half of the pods would refuse the other half. The live router's annotation tells. */}}
{{- define "overfill.checkWire" -}}
{{- $key := "overfill.io/wire-version" -}}
{{- $name := printf "%s-router" (include "overfill.fullname" .) -}}
{{- $metadata := (lookup "apps/v1" "Deployment" .Release.Namespace $name).metadata | default dict -}}
{{- $live := index ($metadata.annotations | default dict) $key -}}
{{- $own := index .Chart.Annotations $key -}}
{{- if and $live (ne $live $own) }}{{ fail (printf "the release runs wire version %s, this chart %s: their processes refuse each other. Install a second release beside it (docs/how-to/upgrade.md). To lose requests instead: kubectl -n %s annotate deployment/%s %s-" $live $own .Release.Namespace $name $key) }}{{ end -}}
{{- end }}

{{/*
DNS names of the pods' certificate that Helm or cert-manager makes, as a JSON list: hosts, and the roles of pods and of
Prometheus. Clients have a certificate of their own, because a holder of this one may act as any process of the stack.
*/}}
{{- define "overfill.dnsNames" -}}
{{- $service := include "overfill.fullname" . -}}
{{- $inside := printf "%s.%s" $service .Release.Namespace -}}
{{- $roles := list -}}
{{- range list "router" "worker" "scraper" }}{{ $roles = append $roles (printf "%s.role.overfill.internal" .) }}{{ end -}}
{{- concat (list .Values.tls.name "localhost" $service $inside (printf "%s.svc" $inside) (printf "%s.svc.cluster.local" $inside)) .Values.tls.extraDnsNames $roles | uniq | toJson -}}
{{- end }}

{{/* Seconds that a pod may take to stop: the longest answer or drain, plus 45 s for preStop and exit. */}}
{{- define "overfill.terminationSeconds" -}}
{{ add (max (int .Values.longestStreamSeconds) (int .Values.workerGraceSeconds)) 45 }}
{{- end }}

{{/* Formats a flag's value; whole numbers without an exponent. */}}
{{- define "overfill.value" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* Flags of every process. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.args" -}}
- --pair={{ (first .pool.pairs).folder }}
- --host={{ .root.Values.listenHost }}
- --port={{ .pool.port }}
- --metrics-host={{ .root.Values.listenHost }}
- --metrics-port=7690
- --probe-host={{ .root.Values.listenHost }}
- --probe-port=7691
- --tls-cert=/etc/overfill/tls/tls.crt
- --tls-key=/etc/overfill/tls/tls.key
- --tls-ca=/etc/overfill/tls/ca.crt
- --tls-name={{ .root.Values.tls.name }}
- --log-level={{ .root.Values.logLevel }}
{{- range $key, $value := .pool.values.settings }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $key }}
{{- else }}
- {{ printf "--%s=%s" $key (include "overfill.value" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Environment of every container: certificates for `overfill health` and the like, sizes of thread pools. */}}
{{- define "overfill.env" -}}
- {name: OVERFILL_TLS_CA, value: /etc/overfill/tls/ca.crt}
- {name: OVERFILL_TLS_CERT, value: /etc/overfill/tls/tls.crt}
- {name: OVERFILL_TLS_KEY, value: /etc/overfill/tls/tls.key}
- {name: OVERFILL_TLS_NAME, value: {{ .root.Values.tls.name | quote }}}
- {name: OVERFILL_HOME, value: /var/cache/overfill}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: /var/cache/overfill/huggingface}
- {name: GRPC_VERBOSITY, value: ERROR}
- {name: GRPC_ENABLE_FORK_SUPPORT, value: "0"}
{{- range list "OMP_NUM_THREADS" "MKL_NUM_THREADS" "OPENBLAS_NUM_THREADS" "RAYON_NUM_THREADS" }}
- {name: {{ . }}, value: {{ $.threads | quote }}}
{{- end }}
{{- end }}

{{/*
Probes. Their port is in no NetworkPolicy: a node always reaches its own pods, and other pods need not. Argument:
startupSeconds.
*/}}
{{- define "overfill.probes" -}}
startupProbe:
  httpGet: {path: /startupz, port: probes, scheme: HTTPS}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .startupSeconds) 9) 10 }}
readinessProbe:
  httpGet: {path: /readyz, port: probes, scheme: HTTPS}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  # Fails only when the event loop has not run for 30 s. A router without workers is alive: a restart would not help.
  httpGet: {path: /livez, port: probes, scheme: HTTPS}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 3
  # The process hangs, so it will not drain. Without this, Kubernetes would wait for the pod's grace period.
  terminationGracePeriodSeconds: 10
{{- end }}

{{- define "overfill.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "overfill.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "overfill.mounts" -}}
- {name: tls, mountPath: /etc/overfill/tls, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache/overfill}
{{- if eq .Values.pair.source "claim" }}
- {name: pair, mountPath: /pair, readOnly: true}
{{- else }}
- {name: pair, mountPath: /pair}
{{- end }}
{{- end }}

{{- define "overfill.volumes" -}}
- name: tls
  secret: {secretName: {{ include "overfill.tlsSecret" . }}, defaultMode: 0440}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
{{- if or .Values.cache.claimName .Values.cache.create }}
  persistentVolumeClaim: {claimName: {{ .Values.cache.claimName | default (printf "%s-cache" (include "overfill.fullname" .)) }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.cache.size }}}
{{- end }}
- name: pair
{{- if eq .Values.pair.source "claim" }}
  persistentVolumeClaim: {claimName: {{ required "pair.claim.name: which claim has the pair?" .Values.pair.claim.name }}, readOnly: true}
{{- else }}
  emptyDir: {sizeLimit: 1Mi}
{{- end }}
{{- end }}

{{/*
Init container: prepares or downloads the pool's pairs into the cache if they are missing, and links them to their folders.
Each revision of a repository has a folder of its own, because running pods read the previous one. Arguments: root, pool.
*/}}
{{- define "overfill.initContainers" -}}
{{- $pair := .root.Values.pair }}
{{- $image := .pool.values.image }}
{{- /* A router's image can download a pair, but has no torch to prepare one with. */}}
{{- if and (eq .pool.component "router") (eq $pair.source "named") }}{{ $image = (include "overfill.workerPools" .root | fromJsonArray | first).values.image }}{{ end }}
{{- if ne $pair.source "claim" }}
initContainers:
  - name: pair
    image: {{ include "overfill.image" (dict "root" .root "image" $image) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    {{- if eq $pair.source "named" }}
    command:
      - sh
      - -ec
      - |
        while [ $# -gt 0 ]; do
          folder="$(overfill pair path "$1")"
          ln -sfn "$folder" "$2"
          shift 2
        done
      - sh
      {{- range .pool.pairs }}
      - {{ .id | quote }}
      - {{ .folder }}
      {{- end }}
    {{- else }}
    command:
      - sh
      - -ec
      - |
        while [ $# -gt 0 ]; do
          folder="$OVERFILL_HOME/hub/$1/$2"
          hf download "$1" --revision "$2" --local-dir "$folder"{{ if eq .pool.component "router" }} --include "*.json" --include "*.jinja"{{ end }}
          ln -sfn "$folder" "$3"
          shift 3
        done
      - sh
      {{- range .pool.pairs }}
      - {{ required "pair.hub.repository: which repository has the pair?" .id | quote }}
      - {{ .revision | quote }}
      - {{ .folder }}
      {{- end }}
    {{- end }}
    env:
      {{- include "overfill.env" (dict "root" .root "threads" .root.Values.prefill.threads) | nindent 6 }}
      {{- if and (eq $pair.source "hub") $pair.hub.tokenSecretName }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ $pair.hub.tokenSecretName }}, key: token}}
      {{- end }}
      {{- with .pool.values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources:
      {{- toYaml $pair.resources | nindent 6 }}
    securityContext:
      {{- include "overfill.containerSecurity" .root | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /var/cache/overfill}
      - {name: pair, mountPath: /pair}
{{- end }}
{{- end }}

{{/* Scheduling of a pool's pods. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.placement" -}}
{{- $class := .pool.values.priority.className -}}
{{- if and (not $class) (gt (int .pool.values.priority.value) 0) }}{{ $class = printf "%s-%s-%s" .root.Release.Namespace (include "overfill.fullname" .root) .pool.name }}{{ end -}}
{{- with $class }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pool.values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .pool.values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.values.topologySpread }}
{{- if .topologyKey }}
topologySpreadConstraints:
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "overfill.selector" (dict "root" $.root "component" $.pool.component "tier" $.pool.tier) | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{/* Labels and annotations of a pool's pods. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.podMetadata" -}}
labels:
  {{- include "overfill.labels" (dict "root" .root "component" .pool.component "tier" .pool.tier) | nindent 2 }}
  {{- with .pool.values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .pool.values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
