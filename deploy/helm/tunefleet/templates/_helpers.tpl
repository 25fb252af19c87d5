{{/* What a release is called. */}}
{{- define "tunefleet.name" -}}
{{- if contains "tunefleet" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-tunefleet" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels of an object; `part` is coordinator, worker or server. */}}
{{- define "tunefleet.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "tunefleet.selector" . }}
{{- end }}

{{- define "tunefleet.selector" -}}
app.kubernetes.io/name: tunefleet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "tunefleet.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Of all pods: no root, and nothing of the API server. */}}
{{- define "tunefleet.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
{{- end }}

{{- define "tunefleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "tunefleet.token" -}}
- name: TUNEFLEET_TOKEN
  valueFrom:
    secretKeyRef: { name: {{ required "auth.existingSecret: name a Secret whose key `token` holds a token" .Values.auth.existingSecret }}, key: token }
{{- end }}

{{/* Whether programs speak TLS; one of the two must be said. */}}
{{- define "tunefleet.scheme" -}}
{{- if .Values.tls.existingSecret }}https{{ else if .Values.tls.insecure }}http{{ else }}{{ fail "tls.existingSecret: name a Secret with tls.crt, tls.key and ca.crt, or set tls.insecure: true on a network that you trust" }}{{ end }}
{{- end }}

{{- define "tunefleet.url" -}}
{{ include "tunefleet.scheme" . }}://{{ include "tunefleet.name" . }}-coordinator.{{ .Release.Namespace }}.svc:{{ .Values.coordinator.port }}
{{- end }}

{{- define "tunefleet.sharedClaim" -}}
{{ required "shared.existingClaim: name a PersistentVolumeClaim (ReadWriteMany) for datasets, models and outputs" .Values.shared.existingClaim }}
{{- end }}

{{- define "tunefleet.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
