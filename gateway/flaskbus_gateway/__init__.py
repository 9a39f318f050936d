"""The gateway: owns the port, puts requests on the bus and relays the replies."""
