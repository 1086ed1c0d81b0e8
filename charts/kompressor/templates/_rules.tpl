{{/* What the operator may do where it serves. No secrets; nothing is deleted but child Jobs, for owner references clean up. */}}
{{- define "kompressor.rules" -}}
- apiGroups: [kompressor.io]
  resources: [compressionjobs]
  verbs: [get, list, watch, patch] # patch: the finalizer of deletionPolicy Delete
- apiGroups: [kompressor.io]
  resources: [compressionrecipes]
  verbs: [get]
{{- if not .Values.watch.namespaces }}
- apiGroups: [kompressor.io]
  resources: [clustercompressionrecipes]
  verbs: [get]
{{- end }}
- apiGroups: [kompressor.io]
  resources: [compressionjobs/status]
  # set-conditions is no API call: the admission policy asks for it before it lets anyone touch conditions
  verbs: [get, patch, set-conditions]
- apiGroups: [kompressor.io]
  resources: [compressionjobs/finalizers]
  verbs: [update] # asked for by OwnerReferencesPermissionEnforcement when children block their owner's deletion
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete] # delete: a queued Job that its user suspends
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [configmaps, serviceaccounts]
  verbs: [get, create]
- apiGroups: [""]
  resources: [services] # one a job whose pods train together: the names that they find one another by
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  # one role a job, for its worker; neither escalate nor bind, so never more than the operator itself may do
  resources: [roles, rolebindings]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
{{- end -}}

{{/* In the release's own namespace, where replicas agree on who leads. */}}
{{- define "kompressor.leaseRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, create, update]
{{- end -}}
