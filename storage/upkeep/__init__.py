"""Looking after a store: what is in it, whether an object is whole, what differs between manifests.

May import the rest of storage, which imports nothing from here.
"""
