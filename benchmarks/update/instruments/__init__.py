"""What reads the machine: times and peaks by phase, FLOPs, bytes sent, a profile, versions.

None of it knows what is measured; rows, subjects and the report are one folder up.
"""
