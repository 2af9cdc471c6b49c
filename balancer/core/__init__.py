"""
Decisions. Nothing here awaits, opens a socket, logs, reads a real clock or rolls real dice.

Read `domain`, then `dispatch`.
"""
