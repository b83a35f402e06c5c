"""Adapters for those who come from another library; nothing in runmgr imports them."""
