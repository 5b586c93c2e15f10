"""A model's predictions as a Behaviour: what it would say next at fixed places of public texts.

probes     texts without answers, built in or one's own
probing    a model reads them (torch)
behaviour  what it would say, whole (Observation) and as it is published (Behaviour)
"""
