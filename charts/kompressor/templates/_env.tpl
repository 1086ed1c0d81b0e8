{{/* The operator's settings: one variable a field of kompressor_operator/settings.py. */}}
{{- define "kompressor.operatorEnv" -}}
- name: LOGNAME # Kopf asks who it runs as; a number without an entry in /etc/passwd would be no answer
  value: kompressor-operator
- name: KOMPRESSOR_WORKER_IMAGE
  value: {{ include "kompressor.image" (dict "image" .Values.worker.image "chart" .Chart) | quote }}
{{- with .Values.worker.image.pullPolicy }}
- name: KOMPRESSOR_WORKER_IMAGE_PULL_POLICY
  value: {{ . | quote }}
{{- end }}
{{- with .Values.worker.imagePullSecrets }}
- name: KOMPRESSOR_WORKER_IMAGE_PULL_SECRETS
  value: {{ join "," . | quote }}
{{- end }}
{{- with .Values.worker.env }}
- name: KOMPRESSOR_WORKER_ENV
  value: {{ toJson . | quote }}
{{- end }}
{{- with .Values.worker.resources }}
- name: KOMPRESSOR_WORKER_RESOURCES
  value: {{ toJson . | quote }}
{{- end }}
- name: KOMPRESSOR_WORKER_GRACE_SECONDS
  value: {{ .Values.worker.graceSeconds | int | quote }}
{{- with .Values.worker.scratchSize }}
- name: KOMPRESSOR_WORKER_SCRATCH_SIZE
  value: {{ . | quote }}
{{- end }}
{{- with .Values.worker.sharedMemory }}
- name: KOMPRESSOR_WORKER_SHARED_MEMORY
  value: {{ . | quote }}
{{- end }}
{{- with .Values.worker.gpuResource }}
- name: KOMPRESSOR_WORKER_GPU_RESOURCE
  value: {{ . | quote }}
{{- end }}
{{- if .Values.planner.image.repository }}
- name: KOMPRESSOR_PLANNER_IMAGE
  value: {{ include "kompressor.image" (dict "image" .Values.planner.image "chart" .Chart) | quote }}
{{- end }}
{{- if gt (int .Values.replicas) 1 }}
- name: KOMPRESSOR_LEASE_NAMESPACE
  value: {{ .Release.Namespace }}
- name: KOMPRESSOR_LEASE_NAME
  value: {{ include "kompressor.fullname" . }}
{{- end }}
{{- with .Values.watch.namespaces }}
- name: KOMPRESSOR_NAMESPACES
  value: {{ join "," . | quote }}
{{- end }}
- name: KOMPRESSOR_HEALTH_PORT
  value: {{ .Values.healthPort | int | quote }}
- name: KOMPRESSOR_LOG_LEVEL
  value: {{ .Values.logLevel | quote }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
