"""Traces: requests, their attempts and deliveries as spans of OpenTelemetry."""
