{{- define "coalmine.name" -}}
{{- if eq .Release.Name .Chart.Name }}{{ .Chart.Name }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "coalmine.selector" -}}
app.kubernetes.io/name: coalmine
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: aggregator
{{- end }}

{{- define "coalmine.labels" -}}
app.kubernetes.io/name: coalmine
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: coalmine
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end }}

{{- define "coalmine.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "coalmine.agentImage" -}}
{{ .Values.agent.image.repository }}:{{ .Values.agent.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Whether the pod needs its account's token: true or false. */}}
{{- define "coalmine.token" -}}
{{- with .Values }}{{ or .webhook.enabled .watch.enabled .identity.enabled .halts.argo .halts.flagger .halts.deployment }}{{ end }}
{{- end }}

{{/* The account, as the subject of a binding. */}}
{{- define "coalmine.subject" -}}
subjects:
  - kind: ServiceAccount
    name: {{ include "coalmine.name" . }}
    namespace: {{ .Release.Namespace }}
{{- end }}

{{/* Events on what is halted. */}}
{{- define "coalmine.events" -}}
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}
