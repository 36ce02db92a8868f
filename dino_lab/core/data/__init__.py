"""Images, and the crops that student and teacher see of them."""
