"""Backbone, projection head, and the kinds of teacher."""
