"""The API of Kompressor: `kompressor.io/v1alpha1`, shared by operator, worker and CRD. Imports pydantic alone."""
