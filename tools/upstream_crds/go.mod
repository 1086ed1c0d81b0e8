// CRDs that other projects publish, for the tests to apply; nothing is built. tools/upstream_crds.py takes the files.
module kompressor/tools/upstream_crds

go 1.26.0

require (
	github.com/fluxcd/kustomize-controller v1.9.3
	github.com/prometheus-operator/prometheus-operator v0.94.1
)
