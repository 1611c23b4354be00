{{/* Labels of all objects; the argument is a dict with the root and the component. */}}
{{- define "vicuna.labels" -}}
{{ include "vicuna.selector" . }}
app.kubernetes.io/part-of: vicuna-operator
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "vicuna.selector" -}}
app.kubernetes.io/name: vicuna-{{ .component }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* Pod Security Standard "restricted". */}}
{{- define "vicuna.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "vicuna.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "vicuna.scrape" -}}
prometheus.io/scrape: "true"
prometheus.io/port: "9090"
prometheus.io/path: /metrics
{{- end }}

{{- define "vicuna.logEnvironment" -}}
- name: VICUNA_LOG_FORMAT
  value: {{ .Values.log.format | quote }}
- name: RUST_LOG
  value: {{ .Values.log.level | quote }}
{{- end }}

{{- define "vicuna.probes" -}}
readinessProbe:
  httpGet:
    path: /readyz
    port: metrics
  periodSeconds: 2
  timeoutSeconds: 5
livenessProbe:
  httpGet:
    path: /healthz
    port: metrics
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* Rather on nodes that nobody takes away, and apart from each other. */}}
{{- define "vicuna.affinity" -}}
nodeAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      preference:
        matchExpressions:
          - { key: vicuna.dev/capacity, operator: NotIn, values: [spot] }
          - { key: karpenter.sh/capacity-type, operator: NotIn, values: [spot] }
          - { key: eks.amazonaws.com/capacityType, operator: NotIn, values: [SPOT] }
          - { key: cloud.google.com/gke-spot, operator: NotIn, values: ["true"] }
          - { key: kubernetes.azure.com/scalesetpriority, operator: NotIn, values: [spot] }
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 50
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "vicuna.selector" . | nindent 12 }}
{{- end }}
