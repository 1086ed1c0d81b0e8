{{- define "kompressor.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kompressor.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "kompressor.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kompressor.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Cluster-scoped objects carry the release's namespace too: releases of one name in two namespaces do not collide. */}}
{{- define "kompressor.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "kompressor.fullname" .) -}}
{{- end -}}

{{- define "kompressor.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kompressor.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "kompressor.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kompressor.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kompressor.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "kompressor.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: kompressor
{{- end -}}

{{/* repository:tag or repository@digest of the dict {image, chart} */}}
{{- define "kompressor.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* PromQL's matchers for this release's operator, as a ServiceMonitor labels what it scrapes. */}}
{{- define "kompressor.selector" -}}
namespace="{{ .Release.Namespace }}", service="{{ include "kompressor.fullname" . }}-metrics"
{{- end -}}

{{/* The same as labels of an alert. */}}
{{- define "kompressor.target" -}}
namespace: "{{ .Release.Namespace }}", service: "{{ include "kompressor.fullname" . }}-metrics"
{{- end -}}

{{/* What Pod Security calls restricted, container part. */}}
{{- define "kompressor.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "kompressor.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}
