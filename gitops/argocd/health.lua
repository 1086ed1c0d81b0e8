-- Argo CD's health of a kompressor.io/CompressionJob; docs/gitops.md says how to install it.
-- Suspended is its user's word. A job that waits in a queue is Progressing, as is one with trouble that may pass: the message says which.
local health = {status = "Progressing", message = "not looked at yet"}
local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration ~= obj.metadata.generation then
  return health
end
local states = {Complete = "Healthy", Failed = "Degraded", Suspended = "Suspended"}
for _, condition in ipairs(status.conditions) do
  if condition.type == "Ready" and condition.reason ~= nil then
    health.message = condition.reason
    if condition.message ~= nil and condition.message ~= "" then
      health.message = condition.reason .. ": " .. condition.message
    end
  end
  if condition.status == "True" and states[condition.type] ~= nil then
    health.status = states[condition.type]
  end
end
return health
