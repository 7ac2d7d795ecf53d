{{- define "overfill.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 45 | trimSuffix "-" }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Labels of a selector; they never change within a release. Arguments: root, component. */}}
{{- define "overfill.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* PromQL matchers of this release's series, by labels that the PodMonitor adds. */}}
{{- define "overfill.series" -}}
{{- $selector := include "overfill.selector" (dict "root" . "component" "") | fromYaml -}}
{namespace={{ .Release.Namespace | quote }}
{{- range $label, $value := $selector }}, {{ regexReplaceAll "[^a-z]" $label "_" }}={{ $value | quote }}{{ end -}}
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

{{- define "overfill.checkTls" -}}
{{- $ways := list -}}
{{- if .Values.tls.secretName }}{{ $ways = append $ways "tls.secretName" }}{{ end -}}
{{- if .Values.tls.certManager.enabled }}{{ $ways = append $ways "tls.certManager.enabled" }}{{ end -}}
{{- if .Values.tls.generate }}{{ $ways = append $ways "tls.generate" }}{{ end -}}
{{- if eq (len $ways) 0 }}{{ fail "no certificate: processes do not listen beyond loopback without one. Give tls.secretName, tls.certManager.enabled or tls.generate" }}{{ end -}}
{{- if and (gt (len $ways) 1) (ne (join "," $ways) "tls.secretName,tls.generate") }}{{ fail (printf "several certificates: %s. Keep one" (join ", " $ways)) }}{{ end -}}
{{- end }}

{{- define "overfill.keysSecret" -}}
{{ .Values.apiKeys.secretName | default (printf "%s-keys" (include "overfill.fullname" .)) }}
{{- end }}

{{- define "overfill.checkKeys" -}}
{{- if not (or .Values.apiKeys.secretName .Values.apiKeys.generate) }}{{ fail "no API keys: routers do not listen beyond loopback without them. Give apiKeys.secretName or apiKeys.generate" }}{{ end -}}
{{- end }}

{{/* DNS names of a certificate that Helm or cert-manager makes, as a JSON list: hosts, and all roles. */}}
{{- define "overfill.dnsNames" -}}
{{- $service := include "overfill.fullname" . -}}
{{- $inside := printf "%s.%s" $service .Release.Namespace -}}
{{- $roles := list -}}
{{- range list "router" "worker" "client" "operator" "scraper" }}{{ $roles = append $roles (printf "%s.role.overfill.internal" .) }}{{ end -}}
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

{{/* Flags of every process. Arguments: root, pool, port. */}}
{{- define "overfill.args" -}}
- --pair={{ include "overfill.pairFolder" .root }}
- --host={{ .root.Values.listenHost }}
- --port={{ .port }}
- --metrics-host={{ .root.Values.listenHost }}
- --metrics-port=7690
- --tls-cert=/etc/overfill/tls/tls.crt
- --tls-key=/etc/overfill/tls/tls.key
- --tls-ca=/etc/overfill/tls/ca.crt
- --tls-name={{ .root.Values.tls.name }}
- --log-level={{ .root.Values.logLevel }}
{{- range $key, $value := .pool.settings }}
- {{ printf "--%s=%s" $key (include "overfill.value" $value) | quote }}
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

{{/* Probes run a command, because Kubernetes' own gRPC probe does not support TLS. Arguments: port, startupSeconds. */}}
{{- define "overfill.probes" -}}
startupProbe:
  # With --live, because a router without workers is not ready, and a restart would not help.
  exec: {command: [overfill, health, --live, "127.0.0.1:{{ .port }}"]}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .startupSeconds) 9) 10 }}
readinessProbe:
  exec: {command: [overfill, health, "127.0.0.1:{{ .port }}"]}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  exec: {command: [overfill, health, --live, "127.0.0.1:{{ .port }}"]}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 4
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

{{- define "overfill.pairFolder" -}}
{{- if eq .Values.pair.source "claim" }}{{ printf "/pair/%s" .Values.pair.claim.path | trimSuffix "/" }}{{ else }}/pair/link{{ end -}}
{{- end }}

{{/*
Init container: prepares or downloads the pair into the cache if it is missing, and links it to /pair/link. Each revision
of a repository has a folder of its own, because running pods read the previous one. Arguments: root, pool, component.
*/}}
{{- define "overfill.initContainers" -}}
{{- $pair := .root.Values.pair }}
{{- if ne $pair.source "claim" }}
initContainers:
  - name: pair
    # The prefill workers' image, because the router's image has no torch to prepare pairs with.
    image: {{ include "overfill.image" (dict "root" .root "image" .root.Values.prefill.image) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    {{- if eq $pair.source "named" }}
    command: [sh, -ec, 'folder="$(overfill pair path "$1")"; ln -sfn "$folder" /pair/link', sh, {{ $pair.named.name | quote }}]
    {{- else }}
    command:
      - sh
      - -ec
      - |
        folder="$OVERFILL_HOME/hub/$1/$2"
        hf download "$1" --revision "$2" --local-dir "$folder"{{ if eq .component "router" }} --include "*.json" --include "*.jinja"{{ end }}
        ln -sfn "$folder" /pair/link
      - sh
      - {{ required "pair.hub.repository: which repository has the pair?" $pair.hub.repository | quote }}
      - {{ $pair.hub.revision | quote }}
    {{- end }}
    env:
      {{- include "overfill.env" (dict "root" .root "threads" .root.Values.prefill.threads) | nindent 6 }}
      {{- if and (eq $pair.source "hub") $pair.hub.tokenSecretName }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ $pair.hub.tokenSecretName }}, key: token}}
      {{- end }}
      {{- with .pool.extraEnv }}
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

{{/* Scheduling of a pool's pods. Arguments: root, pool, component. */}}
{{- define "overfill.placement" -}}
{{- $class := .pool.priority.className -}}
{{- if and (not $class) (gt (int .pool.priority.value) 0) }}{{ $class = printf "%s-%s-%s" .root.Release.Namespace (include "overfill.fullname" .root) .component }}{{ end -}}
{{- with $class }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pool.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.topologySpread }}
{{- if .topologyKey }}
topologySpreadConstraints:
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "overfill.selector" (dict "root" $.root "component" $.component) | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{/* Labels and annotations of a pool's pods. Arguments: root, pool, component. */}}
{{- define "overfill.podMetadata" -}}
labels:
  {{- include "overfill.labels" (dict "root" .root "component" .component) | nindent 2 }}
  {{- with .pool.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .pool.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
