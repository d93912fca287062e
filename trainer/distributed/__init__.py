"""The processes of a run: process group, devices, gradient reduction."""
