{{/* What the operator may do where it serves. No secrets, and no delete: owner references clean up. */}}
{{- define "kompressor.rules" -}}
- apiGroups: [kompressor.io]
  resources: [compressionjobs]
  verbs: [get, list, watch]
- apiGroups: [kompressor.io]
  resources: [compressionjobs/status]
  # set-conditions is no API call: the admission policy asks for it before it lets anyone touch conditions
  verbs: [get, patch, set-conditions]
- apiGroups: [kompressor.io]
  resources: [compressionjobs/finalizers]
  verbs: [update] # asked for by OwnerReferencesPermissionEnforcement when children block their owner's deletion
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [configmaps, serviceaccounts]
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  # one role a job, for its worker; neither escalate nor bind, so never more than the operator itself may do
  resources: [roles, rolebindings]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
{{- end -}}
