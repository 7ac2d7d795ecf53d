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
{{- range include "overfill.allPools" . | fromJsonArray }}{{ $components = append $components .component }}{{ end -}}
{{ $components | uniq | toJson }}
{{- end }}

{{/*
Values of each revision, as a JSON list with the old one's first. A canary's are those that the release would have with the new
revision alone. So a template that renders a worker's pod with them makes the same pod during the rollout and after it, and the
upgrade that ends the rollout restarts no worker of the new revision.
*/}}
{{- define "overfill.revisions" -}}
{{- $canary := .Values.canary -}}
{{- if not $canary.revision -}}
{{- range list "pair" "tiers" "prefill" "decode" "percent" -}}
{{- if index $canary . }}{{ fail (printf "canary.%s: needs canary.revision: give the new revision a name" .) }}{{ end -}}
{{- end -}}
{{ list .Values | toJson }}
{{- else -}}
{{- if eq $canary.revision .Values.revision }}{{ fail (printf "canary.revision: %s is the name in `revision` too; give the new revision another one, or remove `canary` when its rollout has ended" $canary.revision) }}{{ end -}}
{{- range $tier := keys $canary.tiers -}}
{{- if not (hasKey $.Values.tiers $tier) }}{{ fail (printf "canary.tiers.%s: there is no tier %s in tiers; both revisions have the same tiers" $tier $tier) }}{{ end -}}
{{- end -}}
{{- $new := omit (deepCopy .Values) "canary" -}}
{{- $_ := include "overfill.overwrite" (dict "base" $new "own" (pick $canary "revision" "pair" "tiers" "prefill" "decode")) -}}
{{- $_ := set $new.colocated "replicas" 0 -}}
{{ list .Values $new | toJson }}
{{- end -}}
{{- end }}

{{/*
Pools of one revision, as a JSON list with the routers' first. Each has a name, a component, a port, values, the pairs that its
pods read, and a tier, which is empty unless the values name tiers. Pools of workers also have the revision's name, maybe an empty
one. A tier's values are those of `decode` with its own ones over them. Workers with both stages decode in the default tier; with
them, a pool of 0 workers is left out.
*/}}
{{- define "overfill.pools" -}}
{{- $ports := include "overfill.ports" . | fromJson -}}
{{- $pairs := include "overfill.pairs" . | fromJsonArray -}}
{{- $pools := list (dict "name" "router" "component" "router" "port" $ports.router "tier" "" "values" .Values.router "pairs" $pairs) -}}
{{- $both := gt (int .Values.colocated.replicas) 0 -}}
{{- $revision := .Values.revision -}}
{{- $suffix := ternary (printf "-%s" $revision) "" (ne $revision "") -}}
{{- if $both -}}
{{- $default := first $pairs -}}
{{- $values := deepCopy .Values.colocated -}}
{{- $_ := set $values "autoscaling" (dict "kind" "none") -}}
{{- range $key, $name := dict "ttftObjective" "ttft-objective" "itlObjective" "itl-objective" -}}
{{- $objective := index (index $.Values.tiers $default.tier | default dict) $key | default (index $.Values.router.settings $name) -}}
{{- if and $objective (not (hasKey $values.settings $name)) }}{{ $_ := set $values.settings $name $objective }}{{ end -}}
{{- end -}}
{{- $pools = append $pools (dict "name" (print "colocated" $suffix) "component" "colocated" "revision" $revision "port" $ports.colocated "tier" $default.tier "values" $values "pairs" (list $default)) -}}
{{- end -}}
{{- $others := list (dict "name" (print "prefill" $suffix) "component" "prefill" "revision" $revision "port" $ports.prefill "tier" "" "values" .Values.prefill "pairs" (list (first $pairs))) -}}
{{- range $pairs -}}
{{- $values := deepCopy $.Values.decode -}}
{{- $name := "decode" -}}
{{- if .tier -}}
{{- $name = printf "decode-%s" .tier -}}
{{- $_ := include "overfill.overwrite" (dict "base" $values "own" (omit (index $.Values.tiers .tier) "pair" "revision" "fallback" "ttftObjective" "itlObjective")) -}}
{{- end -}}
{{- $others = append $others (dict "name" (print $name $suffix) "component" "decode" "revision" $revision "port" $ports.decode "tier" .tier "values" $values "pairs" (list .)) -}}
{{- end -}}
{{- range $others -}}
{{- if and $both (ne .values.autoscaling.kind "none") }}{{ fail (printf "%s: autoscaling.kind %s conflicts with colocated.replicas: a stack of workers with both stages has a fixed number of workers" .name .values.autoscaling.kind) }}{{ end -}}
{{- if or (not $both) (gt (int .values.replicas) 0) }}{{ $pools = append $pools . }}{{ end -}}
{{- end -}}
{{ toJson $pools }}
{{- end }}

{{/* Pools of one revision's workers, as "overfill.pools". */}}
{{- define "overfill.workerPools" -}}
{{- $pools := list -}}
{{- range include "overfill.pools" . | fromJsonArray }}{{ if ne .component "router" }}{{ $pools = append $pools . }}{{ end }}{{ end -}}
{{ toJson $pools }}
{{- end }}

{{/* Pools of routers and of all revisions' workers, as "overfill.pools". */}}
{{- define "overfill.allPools" -}}
{{- $pools := list (include "overfill.pools" . | fromJsonArray | first) -}}
{{- range include "overfill.revisions" . | fromJsonArray -}}
{{- $pools = concat $pools (include "overfill.workerPools" (set (omit $ "Values") "Values" .) | fromJsonArray) -}}
{{- end -}}
{{- $names := dict -}}
{{- range $pools -}}
{{- if and $.Values.canary.revision (eq (get . "revision") $.Values.canary.revision) (lt (include "overfill.replicas" .values | int) 1) }}{{ fail (printf "canary: the pool %s would have no worker, so the new revision would never be ready: set replicas in canary.%s. A canary has no colocated workers" .name (ternary (printf "tiers.%s" .tier) .component (ne .tier ""))) }}{{ end -}}
{{- if hasKey $names .name }}{{ fail (printf "two pools would have the name %s, of a tier and a revision: rename one of them" .name) }}{{ end -}}
{{- $_ := set $names .name true -}}
{{- end -}}
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
Pairs of one revision, as a JSON list with the default tier's first. Each has a tier, a folder in the pods, and a source: the name
of a pair, or a repository and its revision. The folders are in /pair, or in the root's `Mount`.
*/}}
{{- define "overfill.pairs" -}}
{{- $mount := get . "Mount" | default "/pair" -}}
{{- $pair := .Values.pair -}}
{{- $pairs := list -}}
{{- if .Values.tiers -}}
{{- $tiers := keys .Values.tiers | sortAlpha -}}
{{- $default := index .Values.router.settings "default-tier" | default (ternary "default" (first $tiers) (has "default" $tiers)) -}}
{{- if not (has $default $tiers) }}{{ fail (printf "router.settings.default-tier: there is no tier %s in tiers" $default) }}{{ end -}}
{{- range prepend (without $tiers $default) $default -}}
{{- $own := index $.Values.tiers . -}}
{{- $folder := ternary (printf "%s/%s" $mount $own.pair) (printf "%s/%s" $mount .) (eq $pair.source "claim") -}}
{{- $pairs = append $pairs (dict "tier" . "folder" $folder "id" $own.pair "revision" ($own.revision | default $pair.hub.revision)) -}}
{{- end -}}
{{- else -}}
{{- $folder := ternary (printf "%s/%s" $mount $pair.claim.path | trimSuffix "/") (printf "%s/link" $mount) (eq $pair.source "claim") -}}
{{- $pairs = list (dict "tier" "" "folder" $folder "id" (ternary $pair.hub.repository $pair.named.name (eq $pair.source "hub")) "revision" $pair.hub.revision) -}}
{{- end -}}
{{ toJson $pairs }}
{{- end }}

{{/* The tiers of one revision as a router's --tiers; empty with one pair, unless its decoder is loaded in another format. */}}
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

{{/*
Labels of a selector; they never change within a release. Arguments: root, component, and a pool's tier and revision. A revision
without a name has an empty label, so that the selectors of two revisions never match the same pods. Kubernetes neither evicts a
pod of two disruption budgets nor scales pods of two autoscalers.
*/}}
{{- define "overfill.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .tier }}
overfill.io/tier: {{ . | quote }}
{{- end }}
{{- if hasKey . "revision" }}
overfill.io/revision: {{ .revision | quote }}
{{- end }}
{{- end }}

{{/* Arguments of "overfill.selector" and "overfill.labels" for a pool. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.poolSelector" -}}
{{ include "overfill.selector" (merge (dict "root" .root) (pick .pool "component" "tier" "revision")) }}
{{- end }}

{{- define "overfill.poolLabels" -}}
{{ include "overfill.labels" (merge (dict "root" .root) (pick .pool "component" "tier" "revision")) }}
{{- end }}

{{/* Labels of the series by which a pool scales, as a JSON object; the PodMonitor adds the release's. Arguments: root, pool. */}}
{{- define "overfill.series" -}}
{{- $series := dict "stage" .pool.component -}}
{{- range $label, $value := include "overfill.selector" (dict "root" .root "component" "") | fromYaml }}{{ $_ := set $series (regexReplaceAll "[^a-z]" $label "_") $value }}{{ end -}}
{{- with .pool.tier }}{{ $_ := set $series "tier" . }}{{ end -}}
{{- if hasKey .pool "revision" }}{{ $_ := set $series "revision" .pool.revision }}{{ end -}}
{{ toJson $series }}
{{- end }}

{{/*
Where a Deployment's `replicas` come from: "values" without an autoscaler; "live" if an earlier manifest may have had the field,
because Helm would set the pool to 1 pod when the field leaves the manifest; otherwise "autoscaler", and no manifest has the field.
So neither an upgrade nor a rollback between such manifests changes the number. The annotation overfill.io/replicas tells later
upgrades. Arguments: root, name, pool.
*/}}
{{- define "overfill.replicasFrom" -}}
{{- $live := lookup "apps/v1" "Deployment" .root.Release.Namespace .name -}}
{{- if eq .pool.values.autoscaling.kind "none" }}values
{{- else if and $live (not (hasKey ($live.metadata.annotations | default dict) "overfill.io/replicas")) }}live
{{- else }}autoscaler
{{- end -}}
{{- end }}

{{/* `replicas` of a pool's Deployment, or nothing. Arguments: as "overfill.replicasFrom". */}}
{{- define "overfill.replicasField" -}}
{{- $from := include "overfill.replicasFrom" . -}}
{{- if eq $from "values" -}}
replicas: {{ .pool.values.replicas }}
{{- else if eq $from "live" -}}
replicas: {{ int (lookup "apps/v1" "Deployment" .root.Release.Namespace .name).spec.replicas }}
{{- end -}}
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

{{/* Secret with a role's certificate: router, worker, scraper or client. Arguments: root, role. */}}
{{- define "overfill.tlsSecret" -}}
{{ .root.Values.tls.secretPrefix | default (printf "%s-tls" (include "overfill.fullname" .root)) }}-{{ .role }}
{{- end }}

{{/* Volume of a role's certificate, as "overfill.tlsSecret". */}}
{{- define "overfill.tlsVolume" -}}
- name: tls
  secret: {secretName: {{ include "overfill.tlsSecret" . | quote }}, defaultMode: 0440}
{{- end }}

{{- define "overfill.checkTls" -}}
{{- $ways := list -}}
{{- if .Values.tls.secretPrefix }}{{ $ways = append $ways "tls.secretPrefix" }}{{ end -}}
{{- if .Values.tls.certManager.enabled }}{{ $ways = append $ways "tls.certManager.enabled" }}{{ end -}}
{{- if .Values.tls.generate }}{{ $ways = append $ways "tls.generate" }}{{ end -}}
{{- if eq (len $ways) 0 }}{{ fail "no certificate: processes do not listen beyond loopback without one. Give tls.secretPrefix, tls.certManager.enabled or tls.generate" }}{{ end -}}
{{- if and (gt (len $ways) 1) (ne (join "," $ways) "tls.secretPrefix,tls.generate") }}{{ fail (printf "several certificates: %s. Keep one" (join ", " $ways)) }}{{ end -}}
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

{{/* Names of the revisions that the release serves, the old one first, separated by commas. */}}
{{- define "overfill.revisionNames" -}}
{{- $names := list -}}
{{- range include "overfill.revisions" . | fromJsonArray }}{{ $names = append $names .revision }}{{ end -}}
{{ join "," $names }}
{{- end }}

{{/* Refuses an upgrade that would remove all workers before the first of another revision is ready. The live router's annotation tells. */}}
{{- define "overfill.checkRevision" -}}
{{- $key := "overfill.io/revisions" -}}
{{- $name := printf "%s-router" (include "overfill.fullname" .) -}}
{{- $annotations := ((lookup "apps/v1" "Deployment" .Release.Namespace $name).metadata | default dict).annotations | default dict -}}
{{- if and (hasKey $annotations $key) (not (has .Values.revision (splitList "," (index $annotations $key)))) }}{{ fail (printf "revision: the release runs %q, and an upgrade to %q alone would remove its workers before new ones are ready. Name the new revision in canary.revision first (docs/how-to/rollouts.md). To lose requests instead: kubectl -n %s annotate deployment/%s %s-" (index $annotations $key) .Values.revision .Release.Namespace $name $key) }}{{ end -}}
{{- end }}

{{/*
DNS names of a role's certificate that Helm or cert-manager makes, as a JSON list: its role, of servers the name of any
process, and of routers their hosts. A worker's names no host, so that it cannot pose as a router. Arguments: root, role.
*/}}
{{- define "overfill.dnsNames" -}}
{{- $names := list (printf "%s.role.overfill.internal" .role) -}}
{{- if has .role (list "router" "worker") }}{{ $names = append $names "process.role.overfill.internal" }}{{ end -}}
{{- if eq .role "router" -}}
{{- $service := include "overfill.fullname" .root -}}
{{- $inside := printf "%s.%s" $service .root.Release.Namespace -}}
{{- $names = concat $names (list "overfill" "localhost" $service $inside (printf "%s.svc" $inside) (printf "%s.svc.cluster.local" $inside)) .root.Values.tls.extraDnsNames -}}
{{- end -}}
{{ $names | uniq | toJson }}
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
- {{ printf "--pair=%s" (first .pool.pairs).folder | quote }}
- {{ printf "--host=%s" .root.Values.listenHost | quote }}
- --port={{ .pool.port }}
- {{ printf "--metrics-host=%s" .root.Values.listenHost | quote }}
- --metrics-port=7690
- {{ printf "--probe-host=%s" .root.Values.listenHost | quote }}
- --probe-port=7691
- --tls-cert=/etc/overfill/tls/tls.crt
- --tls-key=/etc/overfill/tls/tls.key
- --tls-ca=/etc/overfill/tls/ca.crt
- --tls-name=overfill
- --log-level={{ .root.Values.logLevel }}
{{- with .root.Values.revision }}
- --revision={{ . }}
{{- end }}
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
- {name: OVERFILL_TLS_NAME, value: overfill}
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
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
{{- if or .Values.cache.claimName .Values.cache.create }}
  persistentVolumeClaim: {claimName: {{ .Values.cache.claimName | default (printf "%s-cache" (include "overfill.fullname" .)) | quote }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.cache.size | quote }}}
{{- end }}
{{ include "overfill.pairVolume" (dict "root" . "name" "pair") }}
{{- end }}

{{/* Volume of one revision's pairs. Arguments: root, name. */}}
{{- define "overfill.pairVolume" -}}
- name: {{ .name }}
{{- if eq .root.Values.pair.source "claim" }}
  persistentVolumeClaim: {claimName: {{ required "pair.claim.name: which claim has the pair?" .root.Values.pair.claim.name | quote }}, readOnly: true}
{{- else }}
  emptyDir: {sizeLimit: 1Mi}
{{- end }}
{{- end }}

{{/* Init containers of a pool's pods: routers read the pairs of both revisions. Arguments: root, pool. */}}
{{- define "overfill.initContainers" -}}
{{- $made := list (include "overfill.pairContainer" (dict "root" .root "pool" .pool "name" "pair" "mount" "/pair")) -}}
{{- if eq .pool.component "router" -}}
{{- range include "overfill.revisions" .root | fromJsonArray | rest -}}
{{- $root := set (omit $.root "Values") "Values" . -}}
{{- $_ := set $root "Mount" "/canary" -}}
{{- $made = append $made (include "overfill.pairContainer" (dict "root" $root "pool" (include "overfill.pools" $root | fromJsonArray | first) "name" "canary-pair" "mount" "/canary")) -}}
{{- end -}}
{{- end -}}
{{- with compact $made }}
initContainers:
{{- range . }}
  {{- . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Init container: prepares or downloads a revision's pairs into the cache if they are missing, and links them to their folders.
Each revision of a repository has a folder of its own, because running pods read the previous one. Empty for pairs on a claim.
Arguments: root, pool, name of the container and of its volume, mount.
*/}}
{{- define "overfill.pairContainer" -}}
{{- $pair := .root.Values.pair -}}
{{- $image := .pool.values.image -}}
{{- /* A router's image can download a pair, but has no torch to prepare one with. */}}
{{- if and (eq .pool.component "router") (eq $pair.source "named") }}{{ $image = (include "overfill.workerPools" .root | fromJsonArray | first).values.image }}{{ end }}
{{- if ne $pair.source "claim" -}}
- name: {{ .name }}
  image: {{ include "overfill.image" (dict "root" .root "image" $image) | quote }}
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
    {{- include "overfill.env" (dict "root" .root "threads" .root.Values.prefill.threads) | nindent 4 }}
    {{- if and (eq $pair.source "hub") $pair.hub.tokenSecretName }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ $pair.hub.tokenSecretName | quote }}, key: token}}
    {{- end }}
    {{- with .pool.values.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    {{- toYaml $pair.resources | nindent 4 }}
  securityContext:
    {{- include "overfill.containerSecurity" .root | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: cache, mountPath: /var/cache/overfill}
    - {name: {{ .name }}, mountPath: {{ .mount }}}
{{- end }}
{{- end }}

{{/* Scheduling of a pool's pods. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.placement" -}}
{{- $class := .pool.values.priority.className -}}
{{- if and (not $class) (gt (int .pool.values.priority.value) 0) }}{{ $class = printf "%s-%s-%s" .root.Release.Namespace (include "overfill.fullname" .root) .pool.name }}{{ end -}}
{{- with $class }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .pool.values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
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
    topologyKey: {{ .topologyKey | quote }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "overfill.poolSelector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{/* Labels and annotations of a pool's pods. Arguments: root, pool (of "overfill.pools"). */}}
{{- define "overfill.podMetadata" -}}
labels:
  {{- include "overfill.poolLabels" . | nindent 2 }}
  {{- if eq .pool.component "router" }}
  # For a gateway's endpoint picker: it may choose a router for any request, and never a worker.
  llm-d.ai/role: prefill-decode
  llm-d.ai/engine-type: vllm
  {{- end }}
  {{- with .pool.values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .pool.values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
