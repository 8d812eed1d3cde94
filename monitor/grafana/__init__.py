"""Grafana's dashboards as code. Needs the extra `dev`; no process imports it.

    panels      the kinds of panel and what all dashboards share, with Grafana's own SDK
    generate    the three dashboards, written as JSON into dashboards/

provisioning/ tells a Grafana server where Prometheus and the dashboards are.
"""
