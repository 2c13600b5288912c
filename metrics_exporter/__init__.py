"""The metrics exporter: figures of one VMM at http://…/metrics, in the text formats of Prometheus and OpenMetrics"""
